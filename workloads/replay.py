"""Replay recorded agent sessions against a server, the recorded history forced, and measure it.

    python -m workloads.replay TRACE... --base-url http://127.0.0.1:30000 [--concurrency 4] [--limit 10]

Every recorded assistant turn is asked for with the recorded messages before it, whatever the server answered earlier,
so that every policy gets the same prompts. Turns of a session go in order, as an agent's would, and find their prefix
in the server's cache; `--concurrency` sessions run at a time. Prompts beyond the context are cut by whole turns and
counted. A failed request is reported and the replay goes on; the exit status is then 1. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAIError
from rich.console import Console

from workloads.fitting import Prompt, fit, upper_bound
from workloads.loaders import load_traces
from workloads.provenance import provenance
from workloads.report import TABLE_WIDTH, Report, Totals, Turn, difference, merge, table
from workloads.schema import Session, TraceError, to_openai

__all__ = ["TABLE_WIDTH", "Report", "merge", "replay", "replay_async", "table"]

MAX_TOKENS = 256
TIMEOUT_SECONDS = 600.0


Plan = dict[int, Prompt | Exception]


class ServerUnreachable(ConnectionError):
    """No server answers at the base URL."""


def replay(sessions: Sequence[Session], base_url: str, **options: Any) -> Report:
    """`replay_async`, run to its end."""
    return asyncio.run(replay_async(sessions, base_url, **options))


async def replay_async(
    sessions: Sequence[Session],
    base_url: str,
    *,
    concurrency: int = 1,
    label: str = "",
    max_tokens: int = MAX_TOKENS,
    temperature: float = 0.0,
    timeout_s: float = TIMEOUT_SECONDS,
    progress: Callable[[Turn], None] | None = None,
) -> Report:
    """Ask for every recorded turn of `sessions`; `progress` is called after each. Raises ServerUnreachable."""
    async with httpx.AsyncClient(base_url=base_url, timeout=timeout_s) as http:
        server = await _Server.connect(http, base_url, max_tokens=max_tokens, temperature=temperature)
        turnstile = asyncio.Semaphore(concurrency)

        async def run(session: Session, plan: Plan) -> list[Turn]:
            async with turnstile:
                return [turn async for turn in _turns(server, session, plan, progress)]

        async with server.client:
            plans = [await server.plan(session) for session in sessions]  # asks for token counts: before the clock
            before = await server.totals()
            began = time.perf_counter()
            turns = await asyncio.gather(*(run(*pair) for pair in zip(sessions, plans, strict=True)))
            wall_s = time.perf_counter() - began
            after = await server.totals()
    totals = difference(after, before) if after is not None and before is not None else None
    return Report(label, tuple(turn for part in turns for turn in part), wall_s, totals, server.speculates)


async def _turns(
    server: _Server, session: Session, plan: Plan, progress: Callable[[Turn], None] | None
) -> AsyncIterator[Turn]:
    for index, prompt in plan.items():
        if isinstance(prompt, Prompt):
            turn = await server.stream(session, index, prompt)
        else:
            turn = _failed(session, index, Prompt([], 0, False), prompt)
        if progress is not None:
            progress(turn)
        yield turn


class _Server:
    """The server under test, through its OpenAI API and two of SGLang's own routes."""

    def __init__(self, http: httpx.AsyncClient, base_url: str, model: str, context: int, options: dict[str, Any]):
        self.http = http
        self.model = model
        self.context = context
        self.options = options
        self.speculates = False
        self.client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=http.timeout.read)

    @classmethod
    async def connect(cls, http: httpx.AsyncClient, base_url: str, **options: Any) -> _Server:
        """Ask the server what it serves; raises ServerUnreachable, or ValueError for options that it cannot meet."""
        try:
            reply = await http.get("/v1/models")
            reply.raise_for_status()
            model = reply.json()["data"][0]
            name, context = model["id"], int(model["max_model_len"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerUnreachable(
                f"--base-url {base_url}: no server answers /v1/models there ({type(error).__name__}: {error}); "
                "start one, e.g. with `make serve`, and give its address without /v1"
            ) from error
        if options["max_tokens"] >= context:
            raise ValueError(f"--max-tokens {options['max_tokens']}: the server's context is {context}; give less")
        return cls(http, base_url.rstrip("/"), name, context, options)

    async def totals(self) -> Totals | None:
        """The counters of WHIFLASH; None where the server has none."""
        try:
            reply = await self.http.get("/server_info")
        except httpx.HTTPError:  # gone in the meantime: its turns have failed, and are the report
            return None
        if reply.status_code != 200:
            return None
        info = reply.json()
        self.speculates = info.get("speculative_algorithm") is not None
        states = info.get("internal_states") or [{}]
        return states[0].get("whiflash")

    async def plan(self, session: Session) -> Plan:
        """The prompt of each turn, by message index, or why there is none."""
        messages = [to_openai(message) for message in session.messages]
        plan: Plan = {}
        for index in session.turns:
            try:
                plan[index] = await self.fit(messages[:index], session.tools)
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:  # also PromptTooLong
                plan[index] = error
        return plan

    async def fit(self, history: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Prompt:
        room = self.context - self.options["max_tokens"] - 1
        if upper_bound(history, tools) <= room:
            return Prompt(history, 0, False)

        async def count(messages: list[dict[str, Any]]) -> int:
            body = {"model": self.model, "messages": messages} | ({"tools": tools} if tools else {})
            reply = await self.http.post("/v1/tokenize", json=body)
            reply.raise_for_status()
            return int(reply.json()["count"])

        return await fit(history, room, count)

    async def stream(self, session: Session, index: int, prompt: Prompt) -> Turn:
        """One request; its text, counts and times as they arrive."""
        parts: dict[str, list[str]] = {"reasoning": [], "content": [], "calls": []}
        usage, finished, first, last = None, False, None, None
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.http.timeout.read):  # of the whole answer
                stream = await self.client.chat.completions.create(
                    model=self.model,
                    messages=prompt.messages,  # type: ignore[arg-type]
                    tools=session.tools or None,  # type: ignore[arg-type]
                    stream=True,
                    stream_options={"include_usage": True},
                    **self.options,
                )
                async for chunk in stream:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        finished = finished or choice.finish_reason is not None
                        if collect(choice.delta, parts):
                            last = time.perf_counter()
                            first = first or last
        except TimeoutError:
            return _failed(session, index, prompt, TimeoutError(f"no whole answer in {self.http.timeout.read:g} s"))
        except (OpenAIError, httpx.HTTPError, ValueError) as error:  # ValueError: an event that is no JSON
            return _failed(session, index, prompt, error)
        if not finished or usage is None:
            return _failed(session, index, prompt, ConnectionError("the stream ended before the text did"))
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
        count = usage.completion_tokens
        return Turn(
            session_id=session.session_id,
            index=index,
            # A streaming parser keeps or drops white space between the parts by where its chunks end.
            text="".join("".join(pieces).strip() for pieces in parts.values()),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=cached or 0,
            completion_tokens=count,
            ttft_s=first - began if first else None,
            tpot_s=(last - first) / (count - 1) if first and last and count > 1 else None,
            cut_turns=prompt.cut_turns,
            shortened=prompt.shortened,
            error=None,
        )


def collect(delta: Any, parts: dict[str, list[str]]) -> bool:
    """Add a streamed delta's text to `parts`, tool calls as name and arguments; whether there was any."""
    calls = [call.function for call in delta.tool_calls or () if call.function]
    found = {
        "reasoning": [getattr(delta, "reasoning_content", None)],
        "content": [delta.content],
        "calls": [part for call in calls for part in (call.name, call.arguments)],
    }
    for kind, pieces in found.items():
        parts[kind] += [piece for piece in pieces if piece]
    return any(piece for pieces in found.values() for piece in pieces)


def _failed(session: Session, index: int, prompt: Prompt, error: Exception) -> Turn:
    reason = f"{type(error).__name__}: {error}"
    return Turn(session.session_id, index, "", 0, 0, 0, None, None, prompt.cut_turns, prompt.shortened, reason)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0; give e.g. 4")
    return value


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
        raise argparse.ArgumentTypeError(f"`{text}` is no URL ({error}); give e.g. http://127.0.0.1:30000") from error
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workloads.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="demo JSON lines, tau-bench or SWE-agent")
    parser.add_argument("--base-url", type=_url, required=True, help="e.g. http://127.0.0.1:30000")
    parser.add_argument("--concurrency", type=_positive, default=1, help="sessions at a time (default: %(default)s)")
    parser.add_argument("--limit", type=_positive, help="replay the first N sessions only")
    parser.add_argument("--max-tokens", type=_positive, default=MAX_TOKENS, help="of a turn (default: %(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.0)
    parser.add_argument("--timeout", type=_positive, default=TIMEOUT_SECONDS, help="seconds a request may take")
    parser.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read, and count them")
    parser.add_argument("--label", default="server", help="name of the row in the table")
    parser.add_argument("--json-out", type=Path, help="write the JSON line to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.json_out and args.json_out.is_dir():
        parser.error(f"argument --json-out: {args.json_out}: is a folder; give a file")
    if args.json_out and not args.json_out.resolve().parent.is_dir():
        parser.error(f"argument --json-out: {args.json_out}: its folder does not exist; create it first")
    try:
        loaded = load_traces(args.traces, skip_bad=args.skip_bad)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in loaded.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    sessions = loaded.sessions[: args.limit]
    if not any(session.turns for session in sessions):
        print("error: TRACE: no recorded assistant turn to replay; give other traces", file=sys.stderr)
        return 2
    try:
        report = replay(
            sessions,
            args.base_url,
            concurrency=args.concurrency,
            label=args.label,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            timeout_s=args.timeout,
            progress=_print_failure,
        )
    except (ServerUnreachable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    figures = report.figures() | {"sessions": len(sessions), "skipped": len(loaded.skipped)}
    Console(width=TABLE_WIDTH).print(table({args.label: figures}))
    arguments = {name: _plain(value) for name, value in vars(args).items()}
    line = json.dumps({"benchmark": "replay", "arguments": arguments, "figures": figures, **provenance()})
    print(line)
    if args.json_out:
        args.json_out.write_text(line + "\n")
    return 1 if figures["failed"] else 0


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _print_failure(turn: Turn) -> None:
    if turn.error is not None:
        print(f"failed: {turn.session_id}, message {turn.index}: {turn.error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
