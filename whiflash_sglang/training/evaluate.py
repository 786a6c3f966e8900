"""Evaluate the demo models: valid tool calls, and acceptance length by drafter and span.

Both are measured on the target's own greedy replies to recorded histories (`replies.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from whiflash_sglang.training.replies import Positions
from whiflash_sglang.training.text import SPANS


def tool_calls(text: str) -> list[dict[str, Any] | None]:
    """The tool calls in a reply; None for invalid ones (not a JSON object with a name and arguments)."""
    calls: list[dict[str, Any] | None] = []
    for piece in text.split("<tool_call>")[1:]:
        try:
            call = json.loads(piece.split("</tool_call>")[0])
            calls.append(call if isinstance(call, dict) and {"name", "arguments"} <= set(call) else None)
        except json.JSONDecodeError:
            calls.append(None)
    return calls


def call_figures(texts: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Shares of valid tool calls, and of those equal to the recorded ones. `texts`: pairs (recorded turn, reply)."""
    asked = [(recorded, text) for recorded, text in texts if "<tool_call>" in recorded]
    parsed = [tool_calls(text) for _, text in asked]
    return {
        "calls": len(asked),
        "parse": float(np.mean([bool(calls) and None not in calls for calls in parsed])),
        "equal_to_recorded": float(
            np.mean([calls == tool_calls(recorded) for calls, (recorded, _) in zip(parsed, asked, strict=True)])
        ),
    }


def acceptance_figures(replies: Sequence[Positions]) -> dict[str, Any]:
    """Mean acceptance lengths with every position of the replies as a round start, in total and by span."""
    spans, entropy, e3, df = (
        np.concatenate([getattr(reply, field) for reply in replies]) for field in ("span", "entropy", "e3", "df")
    )
    by_span = {
        SPANS[span]: {
            "positions": int((spans == span).sum()),
            "e3": round(float(e3[spans == span].mean()), 2),
            "df": round(float(df[spans == span].mean()), 2),
            "entropy": round(float(entropy[spans == span].mean()), 3),
        }
        for span in (1, 2, 3)
        if (spans == span).any()
    }
    return {
        "acceptance_length": {"e3": round(float(e3.mean()), 3), "df": round(float(df.mean()), 3)},
        "by_span": by_span,
    }
