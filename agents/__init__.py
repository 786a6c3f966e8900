"""Client side: a chat model for LangGraph tool loops, and an example agent."""

from agents.chat import ChatWhiFlash
from agents.hints import HintError, Hints

__all__ = ["ChatWhiFlash", "HintError", "Hints"]
