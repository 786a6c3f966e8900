"""The replay's command line: flags and their combinations. Errors name flag, value and fix."""

from __future__ import annotations

import argparse
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from whiflash_workloads import pacing, slo
from whiflash_workloads.runner import MAX_TOKENS, RETRIES, TIMEOUT_SECONDS, Settings

TOKEN_VIEWS = 16


def build_parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser, with `doc` as its description."""
    parser = argparse.ArgumentParser(
        prog="python -m whiflash_workloads.replay",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("traces", nargs="+", type=Path, metavar="TRACE", help="trace files in any supported format (docs/traces.md)")
    add("--base-url", type=_url, required=True, help="e.g. http://127.0.0.1:30000")
    add("--label", default="server", help="name of the table row, and of the policy in a report")
    add("--limit", type=_positive, help="replay the first N sessions only")
    add("--skip-bad", action="store_true", help="skip and count records that cannot be read")
    add("--max-tokens", type=_positive, default=MAX_TOKENS, help="per turn (default: %(default)s)")
    add("--temperature", type=_temperature, default=0.0)
    add("--timeout", type=_positive, default=TIMEOUT_SECONDS, help="seconds per request (default: %(default)s)")
    add("--retries", type=_count, default=RETRIES, help="of failed connections (default: %(default)s)")
    load = parser.add_argument_group("load")
    add = load.add_argument
    add("--history", choices=("forced", "live"), default="forced", help="messages before a turn (default: forced)")
    add("--concurrency", type=_positive, help="closed loop: concurrent sessions (default: 1)")
    add("--arrivals", type=_said_by(pacing.parse_arrivals), metavar="{recorded,poisson:RATE}", help="open loop")
    add("--seed", type=_count, default=0, help="of Poisson arrivals (default: %(default)s)")
    add("--tool-time", default="zero", metavar="{recorded,zero,scale:X}", help="how long tools take (default: zero)")
    add("--warm-up", type=_count, default=0, metavar="N", help="do not count the first N sessions")
    add("--cache-bust", action="store_true", help="prefix every prompt with a marker unique to this run")
    shown = parser.add_argument_group("figures")
    add = shown.add_argument
    add("--slo", type=_said_by(slo.parse), metavar="LIMITS", help="e.g. ttft_ms=500,tpot_ms=30,e2e_ms=4000")
    add("--no-turn-figures", action="store_true", help="do not request WhiFlash's figures of each turn")
    add("--token-views", type=_count, metavar="N", help=f"turns to trace (default: {TOKEN_VIEWS} with an output file)")
    add("--json-out", type=Path, metavar="FILE", help="write the JSON line and the report's data to this file")
    add("--report", type=Path, metavar="FILE", help="write an HTML report to this file")
    return parser


def settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Settings:
    """Convert parsed flags to Settings. Exits with an error for contradictory flags."""
    for name in ("json_out", "report"):
        _check_output(parser, f"--{name.replace('_', '-')}", getattr(args, name))
    if args.arrivals is not None and args.concurrency is not None:
        parser.error(f"argument --concurrency: {args.concurrency}: conflicts with --arrivals (open loop); drop one")
    try:
        tool_scale = pacing.parse_tool_time(args.tool_time)
    except ValueError as error:
        parser.error(f"argument --tool-time: {error}")
    views = args.token_views
    if views is None:
        views = TOKEN_VIEWS if (args.json_out or args.report) and not args.no_turn_figures else 0
    elif views and args.no_turn_figures:
        parser.error(f"argument --token-views: {views}: needs the figures of each turn; drop --no-turn-figures")
    return Settings(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        timeout_s=args.timeout,
        retries=args.retries,
        concurrency=args.concurrency or 1,
        arrivals=args.arrivals,
        seed=args.seed,
        live=args.history == "live",
        tool_scale=tool_scale,
        warm_up=args.warm_up,
        marker=f"[run {uuid.uuid4().hex[:8]}]" if args.cache_bust else "",
        turn_figures=not args.no_turn_figures,
        token_views=views,
        limits=args.slo,
    )


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON values."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(part) for part in value]
        if isinstance(value, pacing.Arrivals):
            return "recorded" if value.rate is None else f"poisson:{value.rate:g}"
        return str(value) if isinstance(value, Path) else value

    return {name: one(value) for name, value in vars(args).items()}


def _check_output(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    if path is not None and path.is_dir():
        parser.error(f"argument {flag}: {path}: is a folder; give a file")
    if path is not None and not path.resolve().parent.is_dir():
        parser.error(f"argument {flag}: {path}: its folder does not exist; create it")


def _said_by(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap `parse` so that argparse shows its ValueError's message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        bound = "above 0" if least else "of at least 0"
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number {bound}; give e.g. 4")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _count(text: str) -> int:
    return _whole(text, 0)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of at least 0; give e.g. 0.7")
    return value


def _url(text: str) -> str:
    try:
        httpx.URL(text)
    except httpx.InvalidURL as error:
        raise argparse.ArgumentTypeError(
            f"`{text}` is not a URL ({error}); give e.g. http://127.0.0.1:30000"
        ) from error
    return text
