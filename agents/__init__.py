"""Client side: adapters for LangGraph tool loops."""
