"""A chat model that calls tools: as a program, a server of it that prints its address."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from typing import Any

from cluster_tasks.testing import FakeOpenAI


def call_tools(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Call the first tool, or the one that is asked for, when the user has spoken."""
    asked, tools = body["messages"][-1], body.get("tools")
    if not tools or asked["role"] != "user":
        return None
    choice = body.get("tool_choice")
    wanted = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
    schema = next(tool["function"] for tool in tools if tool["function"]["name"] == wanted)["parameters"]
    given = {
        name: 3 if schema["properties"][name].get("type") == "integer" else asked["content"]
        for name in schema.get("required", ())
    }
    function = {"name": wanted, "arguments": json.dumps(given)}
    return {"tool_calls": [{"id": "call-1", "type": "function", "function": function}]}


if __name__ == "__main__":
    with FakeOpenAI(answer=call_tools) as server:
        sys.stdout.write(f"{server.base_url}\n")
        sys.stdout.flush()
        threading.Event().wait()
