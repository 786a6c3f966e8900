"""The launcher, except that drafts are accepted and drafters chosen as they were in a recording: for models without
weights, of which nothing would be accepted and every score would say the same.

    WHIFLASH_BENCH_FORCED='{...}' python -m whiflash_sglang.training.forced_server --model-path ... [flags]

The round is the launcher's own; what it computes is computed, and then three things are replaced. How many drafts stand
is drawn from the lengths recorded for chains of as many drafts. A score is drawn, so that a drafter is chosen as often,
and kept as long, as recorded; drawing counts as the host's part of a round. And with `synchronize`, the steps of a
round are timed with the device waited for before and after each, as a launch says nothing of what it costs; the round
as a whole is then slower than it would be.

Nothing of the server knows of this module. SGLang spawns its scheduler where there is a GPU, and a spawned process
imports the main module anew under the name `__mp_main__`: it is replaced there too.
"""

from __future__ import annotations

import functools
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from whiflash_sglang.core.types import Accepted, Proposal

VARIABLE = "WHIFLASH_BENCH_FORCED"
FOR_E3, FOR_DF = 2.0, -2.0  # scores: nats on either side of the usual threshold, or tokens of a usual gain


@dataclass(frozen=True)
class Recording:
    """What is forced. `acceptance`: number of drafts of a chain -> how often 0, 1, .. of them were accepted."""

    acceptance: Mapping[int, Sequence[float]]
    e3_share: float  # of rounds
    switch_rate: float  # share of a request's rounds with another drafter than the one before
    synchronize: bool = False
    seed: int = 0

    def to_environ(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Recording:
        content = json.loads(environ[VARIABLE])
        content["acceptance"] = {int(drafts): counts for drafts, counts in content["acceptance"].items()}
        return cls(**content)

    def table(self) -> list[list[float]]:
        """Row n: weights of 0, 1, .. accepted drafts of n, nothing beyond n. Without a record nothing is accepted."""
        size = 1 + max(self.acceptance)
        rows = [[1.0] + [0.0] * (size - 1) for _ in range(size)]
        for drafts, counts in self.acceptance.items():
            kept = [*counts[: drafts + 1]]
            kept[-1] += sum(counts[drafts + 1 :])  # recorded with longer chains: all of this one
            rows[drafts] = [*kept, *[0.0] * (size - len(kept))]
        return rows

    def turns(self) -> tuple[float, float]:
        """Chances in a round of leaving `e3`, and of leaving `df`: those of a two-state chain in balance."""
        if not 0 < self.e3_share < 1:  # one drafter in every round
            return 1.0 - self.e3_share, self.e3_share
        leave_e3 = self.switch_rate / (2 * self.e3_share)
        leave_df = self.switch_rate / (2 * (1 - self.e3_share))
        return min(1.0, leave_e3), min(1.0, leave_df)


class ForcedAcceptance:
    """In the place of `accept.accept`: its result, with drawn lengths."""

    def __init__(self, recording: Recording, accept: Callable[[Proposal, torch.Tensor], Accepted]):
        import torch

        self.accept = accept
        self.weights = torch.tensor(recording.table())  # [drafts + 1, accepted + 1]
        self.seed = recording.seed
        self.generator: torch.Generator | None = None

    def __call__(self, proposal: Proposal, predictions: torch.Tensor) -> Accepted:
        import torch

        accepted = self.accept(proposal, predictions)
        if self.generator is None:
            self.weights = self.weights.to(predictions.device)
            self.generator = torch.Generator(predictions.device).manual_seed(self.seed)
        weights = self.weights.index_select(0, proposal.num_drafts)
        drafts = torch.multinomial(weights, 1, generator=self.generator)  # [rows, 1]
        return accepted._replace(num_committed=drafts[:, 0] + 1)


class ForcedChoices:
    """Who drafts next for each request slot."""

    def __init__(self, recording: Recording):
        self.leave_e3, self.leave_df = recording.turns()
        self.random = random.Random(recording.seed)
        self.is_e3: dict[int, bool] = {}  # by request slot

    def draw(self, slot: int) -> bool:
        """Whether `e3` drafts next for the request in `slot`."""
        was_e3 = self.is_e3.get(slot, False)
        leaves = self.random.random() < (self.leave_e3 if was_e3 else self.leave_df)
        self.is_e3[slot] = was_e3 != leaves
        return self.is_e3[slot]


def forced_run(run: Callable[..., Any], recording: Recording) -> Any:
    """`DecodeRound.run` that first writes drawn scores over those that the router has of the rows.

    Before the round's steps and not in the score's own `observe`, so that drawing does not count as routing.
    """
    choices = ForcedChoices(recording)

    @functools.wraps(run)
    def draw_and_run(decode_round: Any, rows: Any) -> Any:
        score = getattr(decode_round.router, "score", None)  # routers that look at nothing have none
        if score is not None:
            score.keep(rows.host.slots, [[FOR_E3 if choices.draw(slot) else FOR_DF] for slot in rows.host.slots])
        return run(decode_round, rows)

    return draw_and_run


def synchronized(timed: Callable[..., Any], synchronize: Callable[[], None]) -> Any:
    """`Totals.timed` that waits for the device before and after the step."""

    @contextmanager
    def timed_synchronized(totals: Any, step: str) -> Iterator[None]:
        synchronize()
        with timed(totals, step):
            yield
            synchronize()

    return timed_synchronized


def synchronized_ingest(ingest: Callable[..., Any], synchronize: Callable[[], None]) -> Any:
    """`DecodeRound.ingest` whose `CatchUp.seconds` are those of the device's work."""

    def ingest_synchronized(decode_round: Any, name: str, slots: Any, committed: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        done = ingest(decode_round, name, slots, committed)
        synchronize()
        return None if done is None else done._replace(seconds=time.perf_counter() - began)

    return ingest_synchronized


def install(recording: Recording) -> None:
    """Replace what the module's docstring names, in this process and those that are forked from it."""
    import torch

    from whiflash_sglang.core import accept, round
    from whiflash_sglang.serving import observe

    decode_round, totals = round.DecodeRound, observe.Totals
    replaced: list[tuple[Any, str, Any]] = [
        (round, "accept", ForcedAcceptance(recording, accept.accept)),
        (decode_round, "run", forced_run(decode_round.run, recording)),
    ]
    if recording.synchronize:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        replaced += [
            (totals, "timed", synchronized(totals.timed, synchronize)),
            (decode_round, "ingest", synchronized_ingest(decode_round.ingest, synchronize)),
        ]
    for owner, name, new in replaced:
        setattr(owner, name, new)


if __name__ in ("__main__", "__mp_main__"):
    install(Recording.from_environ(os.environ))

if __name__ == "__main__":
    from whiflash_sglang import launch_server

    launch_server.main()
