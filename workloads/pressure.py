"""Flags of a demo server that is short of KV slots, with a small backlog and prompts in chunks: soak and chaos."""

from __future__ import annotations

from collections.abc import Sequence

LAUNCHER = "whiflash_sglang.launch_server"
WINDOW = 8  # verify width of the demo's drafters
MAX_BACKLOG = 16
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "50"}  # one request every so many steps


def longest_in(pool: int, window: int = WINDOW) -> int:
    """Tokens of the longest request, its reply included, that a pool takes."""
    return pool - 2 * window


def pressed(router: str, pool: int, models: Sequence[str] = ("--demo",)) -> list[str]:
    flags = {
        "--whiflash-router": router,
        "--whiflash-max-backlog": MAX_BACKLOG,
        "--max-total-tokens": pool,
        "--chunked-prefill-size": 256,
        "--schedule-conservativeness": 0.05,  # admit more than fits, so that requests are retracted for room, too
    }
    return [*models, *(str(part) for flag in flags.items() for part in flag)]
