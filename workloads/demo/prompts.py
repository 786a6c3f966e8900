"""The prompts of a session, rendered by the chat template of a transformers tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def histories(session: dict[str, Any], tokenizer: Any) -> Iterator[tuple[int, list[int]]]:
    """(index, prompt token ids) of each assistant message."""
    messages = [parsed_arguments(message) for message in session["messages"]]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:i], tools=session["tools"], add_generation_prompt=True)
            yield i, list(prompt["input_ids"])


def parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with tool-call arguments as objects, as servers pass them to the template."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": json.loads(function["arguments"])}})
    return {**message, "tool_calls": calls}
