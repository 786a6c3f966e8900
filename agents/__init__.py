"""Client side: a LangChain chat model for LangGraph tool loops, and an example agent."""

from whiflash_agents.chat import ChatWhiFlash
from whiflash_agents.hints import HintError, Hints

__all__ = ["ChatWhiFlash", "HintError", "Hints"]
