"""The exact distribution of a text's next few tokens, and the rounds that may occur on the way.

    exact = continuations(target, prompt, 3, sampling)      # {(3 token ids): probability}
    p = p_value(counts, exact)                              # could these counts be samples of it?

A continuation's probability is the product of its tokens' probabilities under the target's adjusted distribution
(temperature, top-k, top-p, min-p). With top-k there are few continuations, so a chi-square test needs no second sample.

`windows` are the rounds that may begin at each text: the drafts of both drafters, a row without drafts, and the
target's logits at every column. They are computed with the training code, independently of the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from whiflash_sglang.training.drafters import judge
from whiflash_sglang.training.models import Models

Text = tuple[int, ...]  # token ids after the prompt

ROUTES = ("e3", "df", "off")
TEXTS_AT_ONCE = 16
FEW = 5  # cells with a smaller expected count are merged, as the chi-square approximation needs


class Sampling(NamedTuple):
    """A request's sampling parameters."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float = 0.0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The filtered and renormalized distribution, [..., vocab] like `logits`.

        As in SGLang, all filters apply to the unfiltered distribution, and their results are intersected: top-k keeps
        the k best tokens, top-p those whose preceding mass is at most p, min-p those with that share of the best.
        """
        best, tokens = (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True)
        kept = torch.arange(best.shape[-1]) < self.top_k
        kept = kept & (best.cumsum(-1) - best <= self.top_p) & (best >= self.min_p * best[..., :1])
        best = best * kept
        return torch.zeros_like(best).scatter_(-1, tokens, best / best.sum(-1, keepdim=True))

    def params(self) -> dict[str, float]:
        """As SGLang's sampling parameters."""
        return dict(self._asdict())


class Window(NamedTuple):
    """The rounds that may begin at a text, one row per route of ROUTES."""

    tokens: torch.Tensor  # [routes, width] int64; column 0 is the anchor, which is also used as padding
    num_drafts: torch.Tensor  # [routes] int64
    logits: torch.Tensor  # [routes, width, vocab] of the target, after each column


def continuations(target: PreTrainedModel, prompt: Sequence[int], length: int, sampling: Sampling) -> dict[Text, float]:
    """All continuations of `length` tokens with non-zero probability -> probability."""
    found: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        texts = list(found)
        after = sampling.probabilities(last_logits(target, prompt, texts))
        found = {
            (*text, token): found[text] * float(row[token])
            for text, row in zip(texts, after, strict=True)
            for token in row.nonzero()[:, 0].tolist()
        }
    return found


@torch.no_grad()
def last_logits(target: PreTrainedModel, prompt: Sequence[int], texts: Sequence[Text]) -> torch.Tensor:
    """The target's logits [texts, vocab] after the prompt and each of `texts`, which must have equal lengths."""
    rows = torch.tensor([[*prompt, *text] for text in texts])
    return torch.cat([target(part, logits_to_keep=1).logits[:, 0].float() for part in rows.split(TEXTS_AT_ONCE)])


@torch.no_grad()
def windows(models: Models, prompt: Sequence[int], texts: Iterable[Text], steps: int, width: int) -> dict[Text, Window]:
    """The rounds that may begin after the prompt and each of `texts`, up to `width` columns.

    The anchor is the last token of the text or prompt. `steps`: length of EAGLE-3's chain.
    """
    return {text: _window(models, [*prompt, *text], steps, width) for text in texts}


def _window(models: Models, ids: list[int], steps: int, width: int) -> Window:
    drafts: dict[str, list[int]] = {**_drafts(models, ids, steps), "off": []}
    rows = [[ids[-1], *drafts[name][: width - 1]] for name in ROUTES]
    tokens = torch.tensor([row + [ids[-1]] * (width - len(row)) for row in rows])
    whole = torch.cat([torch.tensor(ids[:-1]).expand(len(rows), -1), tokens], dim=1)
    logits = models.target(whole, logits_to_keep=width).logits.float()
    return Window(tokens, torch.tensor([len(row) - 1 for row in rows]), logits)


def _drafts(models: Models, ids: list[int], steps: int) -> dict[str, list[int]]:
    """Each drafter's drafts after `ids`, whose last token is the anchor."""
    embed, head = models.target.get_input_embeddings(), models.target.lm_head.weight
    room = np.array([[*ids, *[0] * steps]])  # with space for the chain's own drafts; neither drafter reads it
    verdict = judge(models.target, room, np.zeros(room.shape, dtype=np.uint8), autocast=False)
    entries = torch.tensor([[len(ids) - 2]])  # a chain starts at the entry before its anchor
    for step in range(steps):
        *_, logits = models.eagle3.chains(embed, verdict, step + 1, entries)
        # The next step reads this draft instead of a recorded token.
        verdict.ids[0, len(ids) + step] = models.eagle3.draft_tokens[logits[0, 0].argmax()]
    blocks = models.dflash.blocks(embed, head, verdict, torch.tensor([[len(ids) - 1]]))
    return {"e3": verdict.ids[0, len(ids) :].tolist(), "df": blocks[0, 0].argmax(-1).tolist()}


@torch.no_grad()
def open_place(target: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, ahead: int) -> list[int]:
    """The prompt and its greedy reply, cut where the next `ahead` tokens have the highest total entropy."""
    ids = torch.tensor([list(prompt)])
    text = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    probabilities = target(text).logits[0].float().softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1)[len(prompt) :]  # after each token of the reply
    return text[0, : len(prompt) + 1 + int(entropy.unfold(0, ahead, 1).sum(-1).argmax())].tolist()


def p_value(counts: Mapping[Text, int], exact: Mapping[Text, float]) -> float:
    """p-value of a chi-square test of `counts` against `exact`; 0 if an impossible text was counted."""
    return joint_p_value([(counts, exact)])


def joint_p_value(samples: Iterable[tuple[Mapping[Text, int], Mapping[Text, float]]]) -> float:
    """p-value of several (counts, exact) pairs together."""
    squares, freedom = 0.0, 0
    for counts, exact in samples:
        if not counts.keys() <= exact.keys():
            return 0.0
        cells = _cells(counts, exact)
        squares += sum((count - expected) ** 2 / expected for count, expected in cells)
        freedom += len(cells) - 1
    half = torch.tensor([freedom / 2, squares / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _cells(counts: Mapping[Text, int], exact: Mapping[Text, float]) -> list[tuple[int, float]]:
    """(counted, expected) per cell; rare cells are merged until each is expected FEW times. Raises ValueError."""
    total = sum(counts.values())
    cells: list[tuple[int, float]] = []
    for text in sorted(exact, key=lambda text: exact[text]):
        cell = (counts.get(text, 0), total * exact[text])
        if cells and cells[-1][1] < FEW:
            cell = (cells[-1][0] + cell[0], cells.pop()[1] + cell[1])
        cells.append(cell)
    if len(cells) < 2:
        raise ValueError(f"{total} continuations are too few for two cells of {FEW}: increase the sample")
    return cells
