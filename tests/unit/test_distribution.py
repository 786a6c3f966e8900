"""Sampled text has the target's own distribution, whoever drafts: 100,000 continuations on real logits for each route.

The rounds are those of the demo models: drafts of both drafters and the target's logits at every column of the window,
from the training code. SGLang's own sampler chooses a token at each column, `accept` decides what stands, and the next
round begins behind what was committed. What comes out is compared with exact probabilities. Seeds are fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

from whiflash_sglang.core.accept import accept
from whiflash_sglang.core.types import Accepted, Proposal
from whiflash_sglang.startup.config import WhiFlashConfig
from whiflash_sglang.startup.demo import DEMO_MODELS
from whiflash_sglang.training.continuations import (
    ROUTES,
    Sampling,
    Text,
    Window,
    continuations,
    joint_p_value,
    open_place,
    p_value,
    windows,
)
from whiflash_sglang.training.models import ModelPaths, Models, load_models
from whiflash_workloads.tokens import heldout_histories

LENGTH = 3
WIDTH = LENGTH + 1  # columns beyond cannot change the first tokens
SAMPLINGS = (Sampling(0.7, 8, 0.95), Sampling(1.0, 4, 0.98), Sampling(1.3, 8, 0.9, 0.02))
COUNT = 100_000 // len(SAMPLINGS) + 1  # continuations by route and sampling
CONSIDERED = 12  # tokens of each distribution that the sampler is given, the most probable ones: more than any top-k
AT_ONCE = 25_000  # rows

Rule = Callable[[Proposal, torch.Tensor], Accepted]


@pytest.fixture(scope="module")
def models() -> Models:
    paths = ModelPaths(*(DEMO_MODELS / name for name in ("target", "dflash", "eagle3")), WhiFlashConfig.eagle_steps)
    return load_models(paths, torch.device("cpu"))


@pytest.fixture(scope="module")
def prompt(models: Models) -> list[int]:
    """A held-out prompt and the beginning of its reply: a place where two open choices follow."""
    return open_place(models.target, heldout_histories(1)[0][0], max_new_tokens=40, ahead=2)


@pytest.fixture(scope="module")
def exact(models: Models, prompt: list[int]) -> dict[Sampling, dict[Text, float]]:
    return {sampling: continuations(models.target, prompt, LENGTH, sampling) for sampling in SAMPLINGS}


@pytest.fixture(scope="module")
def rounds(models: Models, prompt: list[int], exact: dict[Sampling, dict[Text, float]]) -> dict[Text, Window]:
    starts = {text[:n] for text in chain(*exact.values()) for n in range(LENGTH)}
    return windows(models, prompt, starts, WhiFlashConfig.eagle_steps, WIDTH)


def committed(window: Window, routes: torch.Tensor, sampling: Sampling, rule: Rule) -> Counter[Text]:
    """What one round commits for each of `routes` [rows], cut off at LENGTH tokens."""
    whole = (window.logits / sampling.temperature).softmax(-1)
    best, ids = whole.topk(CONSIDERED)  # [routes, width, CONSIDERED]
    found: Counter[Text] = Counter()
    for part in routes.split(AT_ONCE):
        flat = best[part].flatten(0, 1)

        def repeated(value: float, rows: int = len(flat)) -> torch.Tensor:
            return torch.full((rows,), value)

        places = top_k_top_p_min_p_sampling_from_probs_torch(
            flat,
            repeated(sampling.top_k),
            repeated(sampling.top_p),
            repeated(sampling.min_p),
            sampling.min_p > 0,
            None,
            None,
        )
        predictions = ids[part].flatten(0, 1).gather(1, places.long()[:, None]).view(len(part), WIDTH)
        accepted = rule(Proposal(window.tokens[part], window.num_drafts[part]), predictions)
        is_text = torch.arange(WIDTH) < accepted.num_committed[:, None]
        texts, counts = torch.where(is_text, accepted.tokens, -1)[:, :LENGTH].unique(dim=0, return_counts=True)
        for text, count in zip(texts.tolist(), counts.tolist(), strict=True):
            found[tuple(token for token in text if token >= 0)] += count
    return found


def sample(
    rounds: dict[Text, Window], sampling: Sampling, route: str, rule: Rule = accept, count: int = COUNT
) -> Counter[Text]:
    """Continuations, round after round; route "mix" chooses anew for every row of every round."""
    waiting: Counter[Text] = Counter({(): count})
    done: Counter[Text] = Counter()
    while waiting:
        text = min(waiting, key=len)  # nothing that is still to come leads back to a text this short
        rows = waiting.pop(text)
        mixed = torch.randint(len(ROUTES), (rows,))
        routes = mixed if route == "mix" else torch.full((rows,), ROUTES.index(route))
        for more, times in committed(rounds[text], routes, sampling, rule).items():
            whole = (text + more)[:LENGTH]
            # A text that cannot be has no rounds: it stays as it is, and no distribution has it.
            (waiting if whole in rounds else done)[whole] += times
    return done


def careless(proposal: Proposal, predictions: torch.Tensor) -> Accepted:
    """The planted error: one draft in fifty stands although the target chose another token."""
    is_draft = torch.arange(1, WIDTH) <= proposal.num_drafts[:, None]
    let_through = is_draft & (torch.rand(is_draft.shape) < 0.02)
    chosen = torch.where(let_through, proposal.tokens[:, 1:], predictions[:, :-1])
    return accept(proposal, torch.cat([chosen, predictions[:, -1:]], dim=1))


def one_column_late(proposal: Proposal, predictions: torch.Tensor) -> Accepted:
    """The bonus token is what the target said behind the rejected draft, as if it had been accepted."""
    right = accept(proposal, predictions)
    column = right.num_committed.clamp(max=WIDTH - 1)[:, None]
    bonus = predictions.gather(1, column)
    is_rejection = (right.num_committed <= proposal.num_drafts)[:, None]
    tokens = predictions.scatter(1, column - 1, torch.where(is_rejection, bonus, predictions.gather(1, column - 1)))
    return Accepted(tokens, right.num_committed)


@pytest.fixture(scope="module")
def samples(rounds: dict[Text, Window]) -> dict[tuple[str, Sampling], Counter[Text]]:
    torch.manual_seed(1)
    return {(route, sampling): sample(rounds, sampling, route) for route in (*ROUTES, "mix") for sampling in SAMPLINGS}


def test_the_place_is_an_open_one(rounds, exact):
    """Else the tests here would be passed by anything: there are choices, and both drafters are right now and then."""
    for sampling, leaves in exact.items():
        assert sum(leaves.values()) == pytest.approx(1)
        assert len(leaves) >= 7
        first = sampling.probabilities(rounds[()].logits[0, 0])
        for row, route in enumerate(ROUTES[:2]):
            assert 0.1 < first[rounds[()].tokens[row, 1]] < 0.9, route


@pytest.mark.parametrize("route", [*ROUTES, "mix"])
def test_continuations_have_the_targets_distribution(samples, exact, route):
    assert joint_p_value((samples[route, sampling], leaves) for sampling, leaves in exact.items()) > 0.01


@pytest.mark.parametrize("route", ["e3", "df"])
def test_what_follows_a_rejected_draft_has_the_targets_distribution(rounds, samples, exact, route):
    """The bonus token and the tokens behind it, given that the target chose another token than the first draft."""
    draft = int(rounds[()].tokens[ROUTES.index(route), 1])
    found = []
    for sampling, leaves in exact.items():
        rest = {text: probability for text, probability in leaves.items() if text[0] != draft}
        given = {text: probability / sum(rest.values()) for text, probability in rest.items()}
        found.append(({t: count for t, count in samples[route, sampling].items() if t[0] != draft}, given))
    assert joint_p_value(found) > 0.01


@pytest.mark.parametrize("route", ["e3", "df", "mix"])
@pytest.mark.parametrize("rule", [careless, one_column_late])
def test_an_error_in_the_rule_is_caught(rounds, exact, route, rule):
    torch.manual_seed(2)
    sampling = SAMPLINGS[1]
    assert p_value(sample(rounds, sampling, route, rule, count=100_000), exact[sampling]) < 0.01


def test_rare_continuations_are_counted_together():
    exact = {(1,): 0.5, (2,): 0.497, (3,): 0.001, (4,): 0.002}
    assert p_value({(1,): 500, (2,): 496, (3,): 1, (4,): 3}, exact) > 0.9
    assert p_value({(1,): 430, (2,): 566, (3,): 1, (4,): 3}, exact) < 1e-4
    assert p_value({(1,): 500, (5,): 1}, exact) == 0, "a continuation that cannot be"
    with pytest.raises(ValueError, match="too few"):
        p_value({(1,): 3}, exact)
    # A known value: chi-square 6.635 with one degree of freedom is at 1%.
    assert joint_p_value([({(1,): 5000 + 129, (2,): 5000 - 129}, {(1,): 0.5, (2,): 0.5})]) == pytest.approx(0.01, 0.02)
