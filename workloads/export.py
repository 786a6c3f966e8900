"""Export traces in AIPerf's `mooncake_trace` format, for other replay clients.

    python -m whiflash_workloads.export TRACE... --out trace.jsonl
    aiperf profile --input-file trace.jsonl --custom-dataset-type mooncake_trace --endpoint-type chat ...

One line per turn. `messages` is the whole history before it, as in our own replay. If a reply in the history was not
recorded, the session is written as deltas, and AIPerf (after 0.13.0) inserts the server's replies. `output_length` is
the recorded reply's length, if known, and `extra` the recorded sampling options. A session starts at `timestamp`, if
all sessions have times. Later turns follow after `delay`, the time of tools or user. Length-only sessions stay
length-only. workloads/formats/mooncake.py reads this format.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from whiflash_workloads.formats.mooncake import MS
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.printing import to_readers
from whiflash_workloads.schema import (
    AssistantMessage,
    Message,
    Session,
    ToolMessage,
    TraceError,
    UserMessage,
    to_openai,
)

Row = dict[str, Any]

# AIPerf chooses these itself, or has a field for them.
NOT_EXTRA = {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens"}


def rows(sessions: Sequence[Session]) -> Iterator[Row]:
    """The lines of all sessions, in order."""
    starts = [session.messages[0].timestamp_s for session in sessions]
    known = [start for start in starts if start is not None]
    first = min(known) if known and len(known) == len(starts) else None  # a fixed schedule needs all times
    for session, start in zip(sessions, starts, strict=True):
        yield from _rows(session, None if first is None or start is None else (start - first) * MS)


def _rows(session: Session, timestamp: float | None) -> Iterator[Row]:
    end = 0
    for number, index in enumerate(session.turns):
        new = session.messages[end:index]
        row: Row = {"type": "mooncake_trace", "session_id": session.session_id}
        if number == 0 and timestamp is not None:
            row["timestamp"] = timestamp
        if number and (delay := _delay_s(session, index)) is not None:
            row["delay"] = delay * MS
        yield row | _prompt(session, index, new) | _reply(session.messages[index])
        end = index + 1


def _prompt(session: Session, index: int, new: list[Message]) -> Row:
    for message in new:
        if isinstance(message, UserMessage) and message.lengths:
            hashes = {"hash_ids": message.lengths.hash_ids} if message.lengths.hash_ids else {}
            return {"input_length": message.lengths.input_tokens} | hashes
    tools = {"tools": session.tools} if session.tools else {}
    if session.needs_live_history:
        return {"message_mode": "delta", "messages": list(map(to_openai, new))} | tools
    return {"messages": [to_openai(message) for message in session.messages[:index]]} | tools


def _reply(message: Message) -> Row:
    assert isinstance(message, AssistantMessage)
    options = {key: value for key, value in (message.options or {}).items() if key not in NOT_EXTRA}
    length = {"output_length": message.output_tokens} if message.output_tokens else {}
    return length | ({"extra": options} if options else {})


def _delay_s(session: Session, index: int) -> float | None:
    """Seconds between the previous reply and the request at `index`: the slowest tool's, or by timestamps."""
    previous = max(turn for turn in session.turns if turn < index)
    new = session.messages[previous + 1 : index]
    durations = [message.tool_duration_s for message in new if isinstance(message, ToolMessage)]
    if durations and None not in durations:
        return max(duration for duration in durations if duration is not None)
    replied, asked = session.messages[previous].timestamp_s, new[0].timestamp_s if new else None
    return None if replied is None or asked is None else max(0.0, asked - replied)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_workloads.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="traces in any supported format")
    parser.add_argument("--out", type=Path, required=True, help="output file")
    parser.add_argument("--skip-bad", action="store_true", help="skip and count records that cannot be read")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        loaded = load_traces(args.traces, skip_bad=args.skip_bad)
        for line in loaded.skipped:
            print(f"skipped: {line}", file=sys.stderr)
        lines = list(rows(loaded.sessions))
        if not lines:
            print("error: TRACE: no recorded turn to export; give other traces", file=sys.stderr)
            return 2
        args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {args.out}: cannot be written ({error.strerror}); give another file", file=sys.stderr)
        return 2
    if any("message_mode" in row for row in lines):
        print("note: some replies were not recorded: written as deltas, for AIPerf after 0.13.0", file=sys.stderr)
    timed = "" if "timestamp" in lines[0] else ", without times"
    with to_readers():
        print(f"{len(lines)} turns of {len(loaded.sessions)} sessions in {args.out}{timed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
