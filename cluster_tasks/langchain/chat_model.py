"""``ChatCluster``: a chat model that answers by the nodes that serve ``llm``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    InvalidToolCall,
    ToolMessage,
    convert_to_openai_messages,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCall, tool_call, tool_call_chunk
from langchain_core.output_parsers.openai_tools import make_invalid_tool_call, parse_tool_call
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field

from cluster_tasks.errors import BrokerUnavailable, StreamRestarted
from cluster_tasks.langchain.sending import Sender
from cluster_tasks.streaming.reading import Chunk, Event, Restarted
from cluster_tasks.tasks.streams import TextStream, stream

GENERATE = "llm.generate"
TOLD = ("finish_reason", "provider", "degraded", "degraded_reason", "cached", "age_s")
"""What a message says of its making, beside ``model_name``."""
KNOWN_TO_PROVIDERS = (
    "text", "refusal", "tool_use", "image", "image_url", "audio", "input_audio", "video", "file",
)  # fmt: skip
"""Blocks of an answer that chat completions, or LangChain's translation to them, know."""


class ChatCluster(BaseChatModel):
    """Answers by ``llm.generate``, and streams by the cluster's streaming.

    What is None is left to the nodes' settings, and their providers. Keyword arguments of a call are those of the
    job: ``model``, ``response_format``, ``cache``, whatever the provider takes. An answer that is begun again after
    some of it was streamed raises StreamRestarted, for LangChain cannot take back what it was given; and one that is
    not read to its end is cancelled.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, arbitrary_types_allowed=True)

    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    session_id: str | None = None
    """Calls of one session prefer the same node."""
    allow_degraded: bool = True
    """Whether another provider may answer when the first is not to be had; the message says ``degraded`` then."""
    # Not False by default: LangChain makes models with the values of others (``configurable_fields``), which are given.
    streaming: bool | None = None
    """True: ``invoke`` streams as well. False: ``stream`` yields the answer in one piece."""
    timeout_s: float | None = Field(default=None, alias="timeout")
    """The longest wait for an answer, of a stream for its next piece; None: no limit."""
    app: Celery | None = Field(default=None, exclude=True, repr=False)
    """See ``Sender``."""

    @property
    def _llm_type(self) -> str:
        return "cluster"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "temperature", "max_tokens", "stop", "allow_degraded")}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        # LangChain puts the call's in the place of the model's, None too, and finds answers in its cache by that.
        return super()._get_invocation_params(stop=stop or self.stop, **kwargs)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools, if its provider can.

        ``tool_choice`` is a tool's name, ``"auto"``, ``"none"``, ``"any"`` or True (one of them must be called), or
        what the provider is to be sent.
        """
        formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        if tool_choice:
            kwargs["tool_choice"] = _choice(tool_choice)
        return self.bind(tools=formatted, **kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        return _result(self._sender.call(GENERATE, **self._arguments(messages, stop, kwargs)))

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> ChatResult:  # fmt: skip
        return _result(await self._sender.acall(GENERATE, **self._arguments(messages, stop, kwargs)))

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:  # fmt: skip
        answer = self._streamed(messages, stop, kwargs)
        try:
            for event in answer.events():
                yield _piece(event)
        finally:
            _cancel_unless_ended(answer)

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:  # fmt: skip
        answer = self._streamed(messages, stop, kwargs)
        try:
            async with aclosing(answer.events_async()) as events:
                async for event in events:
                    yield _piece(event)
        finally:
            await asyncio.to_thread(_cancel_unless_ended, answer)

    @property
    def _sender(self) -> Sender:
        return Sender(self.app, self.timeout_s)

    def _streamed(self, messages: list[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]) -> TextStream:
        arguments = self._arguments(messages, stop, given)
        return stream(self._sender.task(GENERATE), timeout_s=self.timeout_s, **arguments)

    def _arguments(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:  # fmt: skip
        """Return the arguments of the job: what the call gives, else what the model has."""
        names = ("model", "temperature", "max_tokens", "session_id", "allow_degraded")
        arguments = {name: getattr(self, name) for name in names} | {"stop": stop or self.stop or None} | dict(given)
        # LangChain's own: whether to call ``_stream``.
        arguments.pop("stream", None)
        return {"messages": _said(messages)} | {name: value for name, value in arguments.items() if value is not None}


def _choice(asked: str | dict[str, Any] | bool) -> str | dict[str, Any]:
    if asked in (True, "any"):
        return "required"
    if isinstance(asked, str) and asked not in ("auto", "none", "required"):
        return {"type": "function", "function": {"name": asked}}
    assert not isinstance(asked, bool)
    return asked


def _said(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages as in chat completions."""
    answered = {message.tool_call_id for message in messages if isinstance(message, ToolMessage)}
    said: list[dict[str, Any]] = []
    for message in messages:
        first, *others = convert_to_openai_messages([_told_to_providers(message)])
        # LangChain leaves out invalid calls. A reply to one, as that its arguments are no JSON, is refused without it.
        if isinstance(message, AIMessage) and (
            calls := [_as_made(call) for call in message.invalid_tool_calls if call["id"] in answered]
        ):
            first["tool_calls"] = [*first.get("tool_calls", ()), *calls]
        said += [first, *others]
    return said


def _as_made(call: InvalidToolCall) -> dict[str, Any]:
    function = {"name": call["name"] or "", "arguments": call["args"] or ""}
    return {"type": "function", "id": call["id"], "function": function}


def _told_to_providers(message: BaseMessage) -> BaseMessage:
    """Return an answer without the blocks that only LangChain or its maker knows; any other message as it is.

    The calls among them are said by ``tool_calls`` as well.
    """
    if not isinstance(message, AIMessage) or isinstance(message.content, str):
        return message
    blocks = [
        block for block in message.content if isinstance(block, str) or block.get("type") in (None, *KNOWN_TO_PROVIDERS)
    ]
    return message.model_copy(update={"content": blocks})


def _result(answer: Mapping[str, Any]) -> ChatResult:
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for call in answer["tool_calls"]:
        try:
            if (parsed := parse_tool_call(call)) is None:
                continue
            if isinstance(parsed["args"], dict):
                calls.append(tool_call(name=parsed["name"], args=parsed["args"], id=parsed["id"]))
            else:
                invalid.append(make_invalid_tool_call(call, "the arguments are no JSON object"))
        except OutputParserException as exc:
            invalid.append(make_invalid_tool_call(call, str(exc)))
    message = AIMessage(
        content=answer["text"], tool_calls=calls, invalid_tool_calls=invalid, usage_metadata=_usage(answer),
        response_metadata=_metadata(answer),
    )  # fmt: skip
    return ChatResult(generations=[ChatGeneration(message=message)])


def _piece(event: Event) -> ChatGenerationChunk:
    if isinstance(event, Restarted):
        raise StreamRestarted(
            "the answer was begun again: what was streamed of it is void, and it is to be asked again"
        )
    if isinstance(event, Chunk):
        return ChatGenerationChunk(message=AIMessageChunk(content=event.text))
    answer = event.result
    calls = [
        tool_call_chunk(
            name=call["function"]["name"], args=call["function"]["arguments"], id=call.get("id"), index=number
        )
        for number, call in enumerate(answer["tool_calls"])
        if "function" in call
    ]
    message = AIMessageChunk(
        content="", tool_call_chunks=calls, usage_metadata=_usage(answer), response_metadata=_metadata(answer),
        chunk_position="last",
    )  # fmt: skip
    return ChatGenerationChunk(message=message)


def _usage(answer: Mapping[str, Any]) -> UsageMetadata:
    used = answer["usage"]
    return UsageMetadata(
        input_tokens=used["prompt_tokens"], output_tokens=used["completion_tokens"], total_tokens=used["total_tokens"]
    )


def _metadata(answer: Mapping[str, Any]) -> dict[str, Any]:
    # What a node of older code does not say is left out.
    return {"model_name": answer["model"]} | {name: answer[name] for name in TOLD if name in answer}


def _cancel_unless_ended(answer: TextStream) -> None:
    if answer.result is None:
        # Without Redis nobody can be told: the job goes on to its end.
        with suppress(BrokerUnavailable, OperationalError):
            answer.cancel()
