"""Servers of a language model that answer as slowly as real ones: ``python -m benchmarks.llm_server --servers 4``.

OpenAI-compatible, on free ports of the loopback, all in one process, which tells their URLs in a line of JSON and ends
when its standard input does. Time passes as on a graphics card of its own for each, with a model of some eight billion
parameters: prompts are read (prefilled) at 2,000 tokens a second, one after the other; an answer comes at 50 tokens a
second, many beside each other. What a server has read is kept in blocks of 16 tokens, the last used ones, as vLLM keeps
them: the longest beginning of a prompt that is there costs nothing. A token is a word.

Now and then it answers 429 with the time to wait, or does not answer at all until the client gives up. Which requests
meet with that is decided by what they ask, and only the first attempt does: so whoever sends the same meets the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BLOCK = 16
PREFILL_S, DECODE_S = 1 / 2000, 1 / 50
"""For a token."""
ANSWER_TOKENS = 20
REFUSED, HUNG = 0.02, 0.005
"""Share of the requests."""
RETRY_AFTER_S = 0.2
HANGS_S = 60.0
PARTS = 100_000


class PrefixCache:
    """The blocks that a server has read last."""

    def __init__(self, tokens: int) -> None:
        self._most = tokens // BLOCK
        self._blocks = OrderedDict[int, None]()

    def read(self, tokens: Sequence[str]) -> int:
        """Read a prompt; return how many of its first tokens were kept already."""
        kept, is_kept, known = 0, True, 0
        for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
            # A block means something only behind what came before it.
            known = hash((known, *tokens[begin : begin + BLOCK]))
            is_kept = is_kept and known in self._blocks
            kept += BLOCK * is_kept
            self._blocks[known] = None
            self._blocks.move_to_end(known)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)
        return kept


@dataclass(slots=True)
class Server:
    """One model on one card."""

    cache: PrefixCache
    seen: set[str]
    """What was asked, of all servers: only first attempts fail."""
    card: asyncio.Lock = field(default_factory=asyncio.Lock)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("requests", "prompt", "kept", "429", "hung"), 0)
    )

    async def answer(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and reply, when the time for it has passed."""
        said = [message["content"] for message in body["messages"]]
        tokens = [token for text in said for token in text.split()]
        match fault(body.get("user", ""), said[-1], self.seen):
            case "429":
                self.counts["429"] += 1
                return 429, {"error": {"message": "too many requests", "type": "rate_limit_error", "code": None}}
            case "hang":
                self.counts["hung"] += 1
                await asyncio.sleep(HANGS_S)
                # Who asked has gone. Read now, it would be in the figures of whoever asks then.
                raise ConnectionAbortedError
        async with self.card:
            kept = self.cache.read(tokens)
            await asyncio.sleep((len(tokens) - kept) * PREFILL_S)
        await asyncio.sleep(ANSWER_TOKENS * DECODE_S)
        self.counts["requests"] += 1
        self.counts["prompt"] += len(tokens)
        self.counts["kept"] += kept
        answer = " ".join(f"w{zlib.crc32(said[-1].encode()) % 997}-{number}" for number in range(ANSWER_TOKENS))
        usage = {"prompt_tokens": len(tokens), "completion_tokens": ANSWER_TOKENS}
        return 200, {
            "id": "chatcmpl-benchmark", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }  # fmt: skip

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lengths = [line for line in head.split("\r\n") if line.lower().startswith("content-length:")]
                body = await reader.readexactly(int(lengths[0].partition(":")[2])) if lengths else b""
                if head.startswith("GET"):
                    status, reply = 200, dict[str, Any](self.counts)
                else:
                    status, reply = await self.answer(json.loads(body))
                writer.write(as_http(status, reply))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # The client has gone, or the servers end: asyncio before 3.12 prints a connection that is cancelled then.
            return
        finally:
            writer.close()


def as_http(status: int, reply: Mapping[str, Any]) -> bytes:
    """Return an answer as it goes over the wire."""
    text = json.dumps(reply)
    lines = [f"HTTP/1.1 {status} -", "Content-Type: application/json", f"Content-Length: {len(text)}"]
    if status == 429:
        lines.append(f"Retry-After: {RETRY_AFTER_S}")
    return "\r\n".join([*lines, "", text]).encode()


def fault(variant: str, question: str, seen: set[str]) -> str:
    """What happens to a request: ``429``, ``hang`` or, as to all that were ``seen``, nothing."""
    name = f"{variant} {question}"
    if name in seen:
        return ""
    seen.add(name)
    part = zlib.crc32(question.encode()) % PARTS / PARTS
    if part < HUNG:
        return "hang"
    return "429" if part < HUNG + REFUSED else ""


async def run(count: int, cache_tokens: int) -> None:
    """Serve until standard input ends."""
    seen: set[str] = set()
    servers = [
        await asyncio.start_server(Server(PrefixCache(cache_tokens), seen).serve, "127.0.0.1", 0) for _ in range(count)
    ]
    print(json.dumps([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1" for server in servers]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for server in servers:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, required=True)
    parser.add_argument("--cache-tokens", type=int, default=16_384, help="that each keeps")
    options = parser.parse_args()
    asyncio.run(run(options.servers, options.cache_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
