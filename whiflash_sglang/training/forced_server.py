"""The launcher with forced acceptance and routing, drawn from a recording. For benchmarks of models without weights.

    WHIFLASH_BENCH_FORCED='{...}' python -m whiflash_sglang.training.forced_server --model-path ... [flags]

Rounds run as usual, with three replacements. The number of accepted drafts is drawn from recorded lengths of chains of
the same size. Scores are drawn so that drafters are chosen as often, and switched as often, as recorded; drawing counts
as host time. With `synchronize`, each step of a round is timed with the device synchronized before and after, which
slows down the round as a whole.

The server does not know this module. With a GPU, SGLang spawns its scheduler, and the spawned process imports the main
module again as `__mp_main__`; the replacements are installed there, too.
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
    """The forced distribution. `acceptance`: drafts per chain -> how often 0, 1, .. of them were accepted."""

    acceptance: Mapping[int, Sequence[float]]
    e3_share: float  # of rounds
    switch_rate: float  # share of a request's rounds with a different drafter than the round before
    synchronize: bool = False
    seed: int = 0

    def to_environ(self) -> dict[str, str]:
        """Environment variables for the server."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Recording:
        """Inverse of `to_environ`."""
        content = json.loads(environ[VARIABLE])
        content["acceptance"] = {int(drafts): counts for drafts, counts in content["acceptance"].items()}
        return cls(**content)

    def table(self) -> list[list[float]]:
        """Row n: weights of 0, 1, .. accepted drafts out of n. Without a record for n, nothing is accepted."""
        size = 1 + max(self.acceptance)
        rows = [[1.0] + [0.0] * (size - 1) for _ in range(size)]
        for drafts, counts in self.acceptance.items():
            kept = [*counts[: drafts + 1]]
            kept[-1] += sum(counts[drafts + 1 :])  # recorded with longer chains: all accepted
            rows[drafts] = [*kept, *[0.0] * (size - len(kept))]
        return rows

    def turns(self) -> tuple[float, float]:
        """Probabilities per round of switching from `e3` and from `df`, as a stationary two-state Markov chain."""
        if not 0 < self.e3_share < 1:  # one drafter in every round
            return 1.0 - self.e3_share, self.e3_share
        leave_e3 = self.switch_rate / (2 * self.e3_share)
        leave_df = self.switch_rate / (2 * (1 - self.e3_share))
        return min(1.0, leave_e3), min(1.0, leave_df)


class ForcedAcceptance:
    """Replaces `accept.accept`: its result with drawn lengths."""

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
        num_committed = torch.where(proposal.num_drafts > 0, drafts[:, 0] + 1, accepted.num_committed)
        return accepted._replace(num_committed=num_committed)


class ForcedChoices:
    """Draws the next drafter of each request slot."""

    def __init__(self, recording: Recording):
        self.leave_e3, self.leave_df = recording.turns()
        self.random = random.Random(recording.seed)
        self.is_e3: dict[int, bool] = {}  # by request slot

    def draw(self, slot: int) -> bool:
        """Whether `e3` drafts next for `slot`."""
        was_e3 = self.is_e3.get(slot, False)
        leaves = self.random.random() < (self.leave_e3 if was_e3 else self.leave_df)
        self.is_e3[slot] = was_e3 != leaves
        return self.is_e3[slot]


def forced_run(run: Callable[..., Any], recording: Recording) -> Any:
    """Wrap `DecodeRound.run` to overwrite the router's scores with drawn ones before the round.

    This happens outside `observe`, so that drawing does not count as routing time.
    """
    choices = ForcedChoices(recording)

    @functools.wraps(run)
    def draw_and_run(decode_round: Any, rows: Any) -> Any:
        score = getattr(decode_round.router, "score", None)  # fixed policies have no score
        if score is not None:
            score.keep(rows.host.slots, [[FOR_E3 if choices.draw(slot) else FOR_DF] for slot in rows.host.slots])
        return run(decode_round, rows)

    return draw_and_run


def synchronized(timed: Callable[..., Any], synchronize: Callable[[], None]) -> Any:
    """Wrap `Totals.timed` to synchronize the device before and after the step."""

    @contextmanager
    def timed_synchronized(totals: Any, step: str) -> Iterator[None]:
        synchronize()
        with timed(totals, step):
            yield
            synchronize()

    return timed_synchronized


def synchronized_ingest(ingest: Callable[..., Any], synchronize: Callable[[], None]) -> Any:
    """Wrap `DecodeRound.ingest` so that `CatchUp.seconds` includes the device's work."""

    def ingest_synchronized(decode_round: Any, name: str, slots: Any, committed: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        done = ingest(decode_round, name, slots, committed)
        synchronize()
        return None if done is None else done._replace(seconds=time.perf_counter() - began)

    return ingest_synchronized


def install(recording: Recording) -> None:
    """Install the replacements in this process and its forked children."""
    import torch

    from whiflash_sglang.core import accept, round
    from whiflash_sglang.serving.totals import Totals

    decode_round = round.DecodeRound
    replaced: list[tuple[Any, str, Any]] = [
        (round, "accept", ForcedAcceptance(recording, accept.accept)),
        (decode_round, "run", forced_run(decode_round.run, recording)),
    ]
    if recording.synchronize:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        replaced += [
            (Totals, "timed", synchronized(Totals.timed, synchronize)),
            (decode_round, "ingest", synchronized_ingest(decode_round.ingest, synchronize)),
        ]
    for owner, name, new in replaced:
        setattr(owner, name, new)


if __name__ in ("__main__", "__mp_main__"):
    install(Recording.from_environ(os.environ))

if __name__ == "__main__":
    from whiflash_sglang import launch_server

    launch_server.main()
