"""Replay recorded agent sessions against a server, and measure it.

    python -m whiflash_workloads.replay TRACE... --base-url http://127.0.0.1:30000 [--concurrency 4] [--report out.html]

Every recorded assistant turn is asked for. With forced history the recorded messages stand before it, whatever the
server answered earlier, so that every policy gets the same prompts; with `--history live` the server's own replies take
the place of the recorded ones. Turns of a session go in order, as an agent's would, and find their prefix in the
server's cache. Sessions run `--concurrency` at a time, or start at their own times (`--arrivals`). Prompts beyond the
context are cut by whole turns and counted.

A failed request is reported and the replay goes on; the exit status is then 1. If the server does not answer any more,
or at Ctrl-C (exit status 130), the figures are of what was done until then. The last line is JSON.
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

INTERRUPTED = 130  # exit status, as a shell gives it for Ctrl-C


def replay(
    sessions: Sequence[Session],
    base_url: str,
    *,
    label: str = "",
    progress: Callable[[Turn], None] | None = None,
    **options: Any,
) -> Report:
    """`replay_async` to its end; `options` are those of `Settings`."""
    settings = Settings(**options)
    return asyncio.run(replay_async(sessions, base_url, settings=settings, label=label, progress=progress))


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(argv)
    except KeyboardInterrupt:  # before the replay or after it, or a second time
        return INTERRUPTED


def run(argv: Sequence[str] | None) -> int:
    """The command; its exit status."""
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
    """Whether there is something to replay, and whether it was timed where times are asked for; raises ValueError."""
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
            f"note: --max-tokens {settings.max_tokens}: {cut} replies of traces of lengths were longer, and end there; "
            f"the longest has {max(lengths)} tokens",
            file=sys.stderr,
        )
    if settings.tool_scale and untimed:
        print(f"note: {untimed} of {outputs} tool outputs have no tool_duration_s; they take no time", file=sys.stderr)


async def _until_ctrl_c(
    sessions: Sequence[Session], base_url: str, settings: Settings, label: str, progress: Callable[[Turn], None]
) -> Report:
    """The replay, ended by the first Ctrl-C with what there is; by a second one at once."""
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
