"""Client side: agent traces, their replay, and the demo world."""
