"""The replay loop: runs sessions at their start times, with turns in order, and records results in a ledger.

A replay ends when all turns are done, `stop` is set (Ctrl-C), or the server no longer responds. In each case the
report covers what was done so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field

import httpx

from whiflash_workloads.client import Answer, Sampling, Server, ServerGone, is_connection_failure
from whiflash_workloads.fitting import Prompt
from whiflash_workloads.history import History
from whiflash_workloads.pacing import Arrivals, tool_pause
from whiflash_workloads.report import Ending, Report, Totals, Turn, difference
from whiflash_workloads.schema import Session
from whiflash_workloads.slo import Limits
from whiflash_workloads.speculation import RequestFigures
from whiflash_workloads.streaming import Times
from whiflash_workloads.synthetic import SAMPLE_WORDS, reply_tokens, sample, with_prompts

MAX_TOKENS = 256
TIMEOUT_SECONDS = 600.0
RETRIES = 2

Plan = dict[int, Prompt | Exception]
Progress = Callable[[Turn], None]
RunSession = Callable[[int, Session], Coroutine[None, None, None]]


@dataclass(frozen=True)
class Settings:
    """Replay options, mostly flags of `workloads/replay.py`."""

    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    timeout_s: float = TIMEOUT_SECONDS
    retries: int = RETRIES
    concurrency: int = 1  # closed loop and warm-up
    arrivals: Arrivals | None = None  # None: closed loop
    seed: int = 0  # of Poisson arrivals
    live: bool = False
    tool_scale: float = 0.0  # factor for recorded tool durations
    warm_up: int = 0  # number of first sessions that are not counted
    marker: str = ""  # prefix of every prompt
    turn_figures: bool = False  # request speculation figures of every turn
    token_views: int = 0  # number of first turns to trace
    limits: Limits | None = None


@dataclass
class Ledger:
    """The results so far."""

    label: str
    settings: Settings
    planned: dict[int, int]  # turns by number of the session
    turns: dict[int, list[Turn]] = field(default_factory=dict)
    divergences: int = 0
    wall_s: float = 0.0
    before: Totals | None = None
    after: Totals | None = None
    speculates: bool = False
    ending: Ending = "complete"

    def add(self, turn: Turn) -> None:
        """Record a finished turn."""
        self.turns.setdefault(turn.session, []).append(turn)

    def report(self) -> Report:
        """The report of what was done so far."""
        whole = [
            number
            for number, turns in self.turns.items()
            if len(turns) == self.planned[number] and not any(turn.error for turn in turns)
        ]
        counted = self.before is not None and self.after is not None
        return Report(
            label=self.label,
            turns=tuple(turn for number in sorted(self.turns) for turn in self.turns[number]),
            wall_s=self.wall_s,
            totals=difference(self.after or {}, self.before or {}) if counted else None,
            speculates=self.speculates,
            whole_sessions=len(whole),
            planned_turns=sum(self.planned.values()),
            ending=self.ending,
            divergences=self.divergences,
            limits=self.settings.limits,
        )


async def replay_async(
    sessions: Sequence[Session],
    base_url: str,
    *,
    settings: Settings,
    label: str = "",
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
) -> Report:
    """Request every recorded turn of `sessions`; `progress` is called after each.

    Raises ServerUnreachable if the server does not respond at the start, ValueError if server or traces do not fit the
    settings.
    """
    check_history(sessions, settings.live)
    counted = sessions[settings.warm_up :]
    ledger = Ledger(label, settings, {number: len(session.turns) for number, session in enumerate(counted)})
    work = asyncio.create_task(_replay(sessions, base_url, ledger, progress))
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            ledger.ending = "interrupted"
    finally:
        stopping.cancel()
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    return ledger.report()


async def _replay(sessions: Sequence[Session], base_url: str, ledger: Ledger, progress: Progress | None) -> None:
    settings = ledger.settings
    timed = sessions[settings.warm_up :]
    starts = settings.arrivals.starts(timed, settings.seed) if settings.arrivals else None
    async with httpx.AsyncClient(base_url=base_url, timeout=settings.timeout_s) as http:
        sampling = Sampling(settings.max_tokens, settings.temperature)
        server = await Server.connect(http, base_url, settings.retries, sampling)
        async with server.client:
            sessions = await with_texts(server, sessions)
            warm_up, counted = sessions[: settings.warm_up], sessions[settings.warm_up :]
            try:
                await closed_loop(warm_up, settings.concurrency, Player(server, settings, {}, set()).play)
                # Counts tokens of long prompts on the server, so do it before the measurement.
                plans = {} if settings.live else {n: await plan(server, s, settings) for n, s in enumerate(counted)}
                player = Player(server, settings, plans, first_turns(counted, settings.token_views), ledger, progress)
                await _measure(player, ledger, counted, starts)
            except* ServerGone:
                ledger.ending = "server gone"


async def _measure(player: Player, ledger: Ledger, sessions: Sequence[Session], starts: Sequence[float] | None) -> None:
    ledger.before = await player.server.totals()
    ledger.speculates = player.server.speculates
    began = time.perf_counter()
    try:
        if starts is None:
            await closed_loop(sessions, player.settings.concurrency, player.play)
        else:
            await open_loop(sessions, starts, player.play)
    finally:
        ledger.wall_s = time.perf_counter() - began
        ledger.after = await player.server.totals()


async def closed_loop(sessions: Sequence[Session], concurrency: int, play: RunSession) -> None:
    """Run `concurrency` sessions at a time, in order. Raises errors as an ExceptionGroup."""
    waiting = iter(enumerate(sessions))

    async def worker() -> None:
        for number, session in waiting:  # shared by all workers
            await play(number, session)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(sessions))):
            group.create_task(worker())


async def open_loop(sessions: Sequence[Session], starts: Sequence[float], play: RunSession) -> None:
    """Start each session at its time in seconds from now. Raises errors as an ExceptionGroup."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for start, number in sorted((start, number) for number, start in enumerate(starts)):
            await asyncio.sleep(max(0.0, began + start - time.perf_counter()))
            group.create_task(play(number, sessions[number]))


def check_history(sessions: Sequence[Session], live: bool) -> None:
    """Raise ValueError if a forced history would need replies that were not recorded."""
    needs = next((session for session in sessions if session.needs_live_history), None)
    if needs is not None and not live:
        raise ValueError(
            f"--history forced: session `{needs.session_id}` has unrecorded replies in its history; use --history live"
        )


async def with_texts(server: Server, sessions: Sequence[Session]) -> Sequence[Session]:
    """The sessions, with synthetic prompts for length-only ones. Slow, so call it before the measurement."""
    if not any(session.length_only for session in sessions):
        return sessions
    tokens_per_word = await server.num_tokens(sample()) / SAMPLE_WORDS
    return [with_prompts(session, tokens_per_word) if session.length_only else session for session in sessions]


async def plan(server: Server, session: Session, settings: Settings) -> Plan:
    """Message index -> the cut prompt or an error, for prompts that exceed the server's context."""
    history, plan = History(session, settings.marker), Plan()
    for index in session.turns:
        messages = history.before(index)
        if not server.surely_fits(messages, session.tools):
            plan[index] = await server.fit(messages, session.tools)
    return plan


def first_turns(sessions: Sequence[Session], count: int) -> set[tuple[int, int]]:
    """The first `count` turns with recorded texts, as (session number, message index)."""
    texts = ((number, session) for number, session in enumerate(sessions) if not session.length_only)
    found = ((number, index) for number, session in texts for index in session.turns)
    return {place for place, _ in zip(found, range(count), strict=False)}


@dataclass(frozen=True)
class Player:
    """Plays sessions, also concurrently. Without a ledger nothing is counted."""

    server: Server
    settings: Settings
    plans: dict[int, Plan]
    traced: set[tuple[int, int]]
    ledger: Ledger | None = None
    progress: Progress | None = None

    async def play(self, number: int, session: Session) -> None:
        """Play one session, turn by turn. Raises ServerGone."""
        history = History(session, self.settings.marker, self.settings.live)
        for depth, index in enumerate(session.turns, start=1):
            if self.ledger is not None:
                await asyncio.sleep(tool_pause(session, index, self.settings.tool_scale))
            prompt = await self.prompt(number, session, history, index)
            if isinstance(prompt, Exception):
                self.note(_turn(number, session, index, depth, Prompt([], 0, False), None, prompt))
                continue
            traced, length = (number, index) in self.traced, reply_tokens(session, index)
            answer = await self.server.ask(prompt.messages, session.tools, traced, length)
            figures = None if session.length_only else await self.figures(answer)
            self.note(_turn(number, session, index, depth, prompt, answer, answer.error, figures))
            if answer.error is None:
                history.answer(index, answer.incoming.reply())
            elif is_connection_failure(answer.error) and not await self.server.is_there():
                raise ServerGone(str(answer.error))
        if self.ledger is not None:
            self.ledger.divergences += history.divergences

    async def prompt(self, number: int, session: Session, history: History, index: int) -> Prompt | Exception:
        """The prompt of the turn at message `index`, cut to the context."""
        messages = history.before(index)
        if number in self.plans:
            return self.plans[number].get(index, Prompt(messages, 0, False))
        return await self.server.fit(messages, session.tools)

    async def figures(self, answer: Answer) -> RequestFigures | str | None:
        """The answer's figures, a reason why they are missing, or None if not wanted or not WhiFlash."""
        wanted = self.settings.turn_figures and self.ledger is not None and self.server.is_whiflash
        return await self.server.speculation(answer.incoming.id) if wanted and answer.error is None else None

    def note(self, turn: Turn) -> None:
        """Record a turn, unless warming up."""
        if self.ledger is None:
            return
        self.ledger.add(turn)
        if self.progress is not None:
            self.progress(turn)


def _turn(
    number: int,
    session: Session,
    index: int,
    depth: int,
    prompt: Prompt,
    answer: Answer | None,
    error: Exception | None,
    figures: RequestFigures | str | None = None,
) -> Turn:
    whole = answer.incoming if answer is not None and error is None else None
    usage = whole.usage if whole else None
    details = usage.prompt_tokens_details if usage else None
    times = whole.times(usage.completion_tokens) if whole and usage else Times()
    return Turn(
        session_id=session.session_id,
        index=index,
        text=whole.reply().text if whole else "",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        ttft_s=times.ttft_s,
        tpot_s=times.tpot_s,
        cut_turns=prompt.cut_turns,
        shortened=prompt.shortened,
        error=None if error is None else f"{type(error).__name__}: {error}",
        e2e_s=times.e2e_s,
        gaps_s=times.gaps_s,
        session=number,
        depth=depth,
        retries=answer.retries if answer else 0,
        speculation=figures if isinstance(figures, RequestFigures) else None,
        missing=figures if isinstance(figures, str) else None,
        length_only=session.length_only,
    )
