"""Minimal recorded sessions."""

from __future__ import annotations

from typing import Any

from whiflash_workloads.schema import Session

TOOL = {"type": "function", "function": {"name": "find_order", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call-1", "type": "function", "function": {"name": "find_order", "arguments": "{}"}}


def session(name: str = "s", words: int = 3, **changes: Any) -> Session:
    """Two turns, at messages 2 and 4. User texts and tool outputs have `words` words each."""
    text = " ".join(["text"] * words)
    messages = [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": text},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call-1", "content": text},
        {"role": "assistant", "content": "It was shipped."},
    ]
    record = {"schema_version": 1, "session_id": name, "source": "test", "tools": [TOOL], "messages": messages}
    return Session.model_validate(record | changes)
