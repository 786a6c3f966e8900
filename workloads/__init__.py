"""Client side: agent traces, recording, replay, reports, and the demo world."""
