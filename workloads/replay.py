"""Replay recorded agent sessions against a server and measure it.

    python -m whiflash_workloads.replay TRACE... --base-url http://127.0.0.1:30000 [--concurrency 4] [--report out.html]

Every recorded assistant turn is requested. With forced history its prompt is the recorded messages, independent of
earlier replies, so every policy gets the same prompts. `--history live` uses the server's own replies instead. Turns of
a session run in order, as in an agent, and hit the server's prefix cache. Sessions run `--concurrency` at a time, or
start at given times (`--arrivals`). Prompts that exceed the context are cut by whole turns and counted.

Failed requests are reported and do not stop the replay; the exit status is then 1. If the server no longer responds, or
on Ctrl-C (exit status 130), the figures cover what was done so far. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from whiflash_workloads import flags, pacing, results
from whiflash_workloads.client import ServerUnreachable
from whiflash_workloads.display import Display, details, notes
from whiflash_workloads.html_report import render
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.printing import Console, to_readers
from whiflash_workloads.provenance import provenance
from whiflash_workloads.report import TABLE_WIDTH, Report, Turn, merge, table
from whiflash_workloads.runner import Settings, replay_async
from whiflash_workloads.schema import Session, TraceError
from whiflash_workloads.synthetic import reply_tokens

__all__ = ["TABLE_WIDTH", "Report", "merge", "replay", "table"]

INTERRUPTED = 130  # a shell's exit status for Ctrl-C


def replay(
    sessions: Sequence[Session],
    base_url: str,
    *,
    label: str = "",
    progress: Callable[[Turn], None] | None = None,
    **options: Any,
) -> Report:
    """Run `replay_async`; `options`: see `Settings`. Raises ServerUnreachable or ValueError."""
    settings = Settings(**options)
    return asyncio.run(replay_async(sessions, base_url, settings=settings, label=label, progress=progress))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        return run(argv)
    except KeyboardInterrupt:  # before or after the replay, or a second time
        return INTERRUPTED


def run(argv: Sequence[str] | None) -> int:
    """Run the command; returns the exit status."""
    parser = flags.build_parser(__doc__)
    args = parser.parse_args(argv)
    settings = flags.settings(parser, args)
    try:
        loaded = load_traces(args.traces, skip_bad=args.skip_bad, limit=args.limit)
        sessions = loaded.sessions
        check(sessions, settings)
    except (TraceError, ValueError) as error:
        return _refuse(error)
    for line in loaded.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    counted = sessions[settings.warm_up :]
    try:
        with Display(sum(len(session.turns) for session in counted)) as display:
            report = asyncio.run(_until_ctrl_c(sessions, args.base_url, settings, args.label, display.show))
    except (ServerUnreachable, ValueError) as error:
        return _refuse(error)
    figures = report.figures() | {"sessions": len(counted), "skipped": len(loaded.skipped), "changed": loaded.changed}
    arguments = flags.plain(args) | {"marker": settings.marker}
    record = {"benchmark": "replay", "arguments": arguments, "figures": figures, **provenance()}
    result = results.Result.model_validate(record | {"detail": results.detail(report, counted)})
    if args.json_out:
        args.json_out.write_text(result.model_dump_json() + "\n", encoding="utf-8")
    if args.report:
        args.report.write_text(render([result]), encoding="utf-8")
    for note in notes(figures, report.turns):
        print(f"note: {note}", file=sys.stderr)
    with to_readers():
        console = Console(width=TABLE_WIDTH)
        for view in (table({args.label: figures}), *details(figures)):
            console.print(view)
        print(json.dumps(record))
    if report.ending == "interrupted":
        return INTERRUPTED
    return 1 if figures["failed"] or report.ending != "complete" else 0


def check(sessions: Sequence[Session], settings: Settings) -> None:
    """Raise ValueError if there is nothing to replay, or no recorded times although `settings` need them."""
    if not any(session.turns for session in sessions):
        raise ValueError("TRACE: no recorded assistant turn to replay; give other traces")
    if not any(session.turns for session in sessions[settings.warm_up :]):
        raise ValueError(
            f"--warm-up {settings.warm_up}: leaves none of {len(sessions)} sessions to count; give less, or more traces"
        )
    untimed, outputs = pacing.untimed_outputs(sessions)
    if settings.tool_scale and outputs and untimed == outputs:
        raise ValueError("--tool-time: no tool output of the traces has a tool_duration_s; give zero")
    lengths = [reply_tokens(session, index) or 0 for session in sessions for index in session.turns]
    if cut := sum(length > settings.max_tokens for length in lengths):
        print(
            f"note: --max-tokens {settings.max_tokens}: {cut} recorded replies are longer and were truncated; "
            f"the longest has {max(lengths)} tokens",
            file=sys.stderr,
        )
    if settings.tool_scale and untimed:
        print(f"note: {untimed} of {outputs} tool outputs have no tool_duration_s; counted as 0 s", file=sys.stderr)


async def _until_ctrl_c(
    sessions: Sequence[Session], base_url: str, settings: Settings, label: str, progress: Callable[[Turn], None]
) -> Report:
    """Run the replay. The first Ctrl-C ends it with partial results, a second one immediately."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, end)
    return await replay_async(sessions, base_url, settings=settings, label=label, progress=progress, stop=stop)


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
