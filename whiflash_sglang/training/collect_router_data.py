"""Collect router data: both drafters' acceptance at every position of the target's replies.

    python -m whiflash_sglang.training.collect_router_data --demo --traces TRACE... --out DIR [--base-url URL]

The target continues every recorded history with a greedy reply, as a server would. Both drafters then draft at every
position of the reply, on the features of a single forward. Traces may have any format of `whiflash_workloads.replay`.
With `--base-url`, a running server with the same target generates the same replies much faster. Interrupted runs are
resumed. `router_data.py` describes the files.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.progress import track

from whiflash_sglang.core.errors import ConfigError, WhiFlashError
from whiflash_sglang.training.models import Models, add_arguments, load_models, paths_of
from whiflash_sglang.training.replies import greedy_replies, positions, prompts_of, served_replies
from whiflash_sglang.training.router_data import Record, shard_path, write_manifest, write_shard
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.printing import to_readers
from whiflash_workloads.schema import Session, TraceError, to_openai

SESSIONS_PER_SHARD = 16


def collect(args: argparse.Namespace) -> int:
    """Write the missing shards. Returns the number of sessions; raises ConfigError or TraceError."""
    paths = paths_of(args)
    loaded = load_traces(args.traces).sessions[: args.limit]
    sessions = [session for session in loaded if session.turns]
    if not sessions:
        raise ConfigError("--traces", None, "contain no recorded assistant turn", "give traces of an agent's sessions")
    num_shards = math.ceil(len(sessions) / SESSIONS_PER_SHARD)
    write_manifest(
        args.out,
        {
            "models": paths.identity().to_json(),
            "traces": [path.name for path in args.traces],
            "sha256": digest(sessions),
            "sessions": len(sessions),
            "shards": num_shards,
            "max_new_tokens": args.max_new_tokens,
        },
    )
    missing = [number for number in range(num_shards) if not shard_path(args.out, number).exists()]
    models = load_models(paths, args.device)
    for number in track(missing, description="shards", disable=None):
        part = sessions[number * SESSIONS_PER_SHARD : (number + 1) * SESSIONS_PER_SHARD]
        write_shard(shard_path(args.out, number), records_of(models, part, args))
        print(f"shard {number + 1} of {num_shards}", file=sys.stderr, flush=True)
    return len(sessions)


def records_of(models: Models, sessions: Sequence[Session], args: argparse.Namespace) -> list[Record]:
    """One record per reply to the sessions' histories."""
    room = models.target.config.max_position_embeddings - args.max_new_tokens
    prompts = [
        prompt
        for session in sessions
        for prompt in prompts_of(plain(session), models.tokenizer)
        if len(prompt.ids) <= room  # longer prompts cannot be served
    ]
    records = []
    if args.base_url:
        replies = served_replies(args.base_url, models.tokenizer, prompts, args.max_new_tokens, args.batch)
    else:
        replies = greedy_replies(models.target, models.tokenizer, prompts, args.max_new_tokens, args.batch)
    for reply in replies:
        found = positions(models.target, models.eagle3, models.dflash, reply, args.whiflash_eagle_steps)
        if found is not None:
            records.append(Record.of(reply, found))
    return records


def plain(session: Session) -> dict[str, Any]:
    """A session in the chat template's format."""
    messages = [to_openai(message) for message in session.messages]
    return {"session_id": session.session_id, "tools": session.tools or None, "messages": messages}


def digest(sessions: Sequence[Session]) -> str:
    """SHA-256 of the sessions' content."""
    text = "".join(session.model_dump_json() for session in sessions)
    return hashlib.sha256(text.encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_sglang.training.collect_router_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="TRACE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--base-url", help="a server with the same target, e.g. http://127.0.0.1:30000")
    parser.add_argument("--limit", type=int, help="use only the first N sessions")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per reply (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="concurrent replies (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        sessions = collect(args)
    except (WhiFlashError, TraceError, httpx.HTTPError) as error:
        raise SystemExit(f"error: {error}") from error
    with to_readers():
        print(f"{sessions} sessions in {args.out}")


if __name__ == "__main__":
    main()
