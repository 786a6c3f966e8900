"""Write sessions of the scripted expert as traces, one JSON line each.

    python -m whiflash_workloads.demo.generate --split heldout --sessions 40 --out workloads/demo/traces/heldout.jsonl

Splits are disjoint seed ranges, so held-out sessions have shops, ids and wordings that training never saw. `router` is
for training routers, because the models know their own training sessions too well; `priors` is for evaluating priors.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whiflash_workloads.demo.expert import solve
from whiflash_workloads.demo.world import USUAL, Lexicon

FIRST_SEED = {"train": 1_000_000, "router": 2_000_000, "priors": 3_000_000, "heldout": 1}
MAX_SESSIONS = 900_000


def sessions(split: str, count: int, invented: float = 0.0) -> Iterator[dict[str, Any]]:
    """The first `count` sessions of a split, a share `invented` of them with made-up names. Raises ValueError."""
    if not 0 < count <= MAX_SESSIONS:
        raise ValueError(f"--sessions {count}: use 1 to {MAX_SESSIONS}, to keep the splits disjoint")
    return (_session(FIRST_SEED[split] + i, invented) for i in range(count))


def _session(seed: int, invented: float) -> dict[str, Any]:
    rng = random.Random(f"lexicon-{seed}")
    return solve(seed, Lexicon.invented(rng) if rng.random() < invented else USUAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=sorted(FIRST_SEED), required=True)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for session in sessions(args.split, args.sessions):
            file.write(json.dumps(session, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
