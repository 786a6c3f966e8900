"""Server flags for stress tests: few KV slots, small backlog, chunked prefill."""

from __future__ import annotations

from collections.abc import Sequence

LAUNCHER = "whiflash_sglang.launch_server"
WINDOW = 8  # verify width of the demo's drafters
MAX_BACKLOG = 16
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}  # retract a request every 50 steps


def longest_in(pool: int, window: int = WINDOW) -> int:
    """Maximum tokens of a request, including its reply, that fits into a pool of `pool` tokens."""
    return pool - 2 * window


def pressed(router: str, pool: int, models: Sequence[str] = ("--demo",)) -> list[str]:
    """Flags of a server with a pool of `pool` tokens."""
    flags = {
        "--whiflash-router": router,
        "--whiflash-max-backlog": MAX_BACKLOG,
        "--max-total-tokens": pool,
        "--chunked-prefill-size": 256,
        "--schedule-conservativeness": 0.05,  # over-admit, to force retractions
    }
    return [*models, *(str(part) for flag in flags.items() for part in flag)]
