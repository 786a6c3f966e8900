"""A fake target, fake drafters and a minimal server in pure torch, to test rounds without models.

The fake target is a hash of the text: its next token and its features at a position depend on the text up to there. A
fake drafter stores what was ingested in each KV slot. When it drafts, it checks that every committed entry is exactly
the expected one, then proposes drafts that are correct with a given probability.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from whiflash_sglang.core.backlog import Backlog
from whiflash_sglang.core.types import Drafts, Entries, HostRows, Prefill, Proposal, Rows, Verified

VOCAB = 11


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: the token after a text. The vocabulary is small, so guesses are sometimes right."""
    state = 17
    for token in tokens[-6:]:
        state = (state * 31 + token * 7 + 3) % 10007
    return (state // 3) % VOCAB


def feature(tokens: Sequence[int]) -> float:
    """The fake target's hidden state at the last token of `tokens`: a number that identifies the text."""
    state = len(tokens)
    for token in tokens:
        state = (state * 131 + token + 1) % 1000003
    return float(state)


def plain_greedy(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class World:
    """The server's state around a round: texts by request slot, and their KV slots."""

    def __init__(self, num_slots: int, max_len: int):
        self.texts: dict[int, list[int]] = {}  # committed tokens and the anchor
        self.table = torch.arange(num_slots * max_len).view(num_slots, max_len)

    def rows(self, slots: Sequence[int], max_width: int) -> Rows:
        known = HostRows([*slots], [len(self.texts[slot]) - 1 for slot in slots])  # the anchor has no KV yet
        index, lens = torch.tensor(known.slots), torch.tensor(known.prefix_lens)
        window = lens[:, None] + torch.arange(-1, max_width)
        anchors = torch.tensor([self.texts[slot][-1] for slot in slots])
        return Rows(index, anchors, lens, self.table[index[:, None], window], known)

    def backlog(self, names: Sequence[str], capacity: int = 16) -> Backlog:
        return Backlog(names, 1, torch.float64, self.table, capacity)

    def prefill(self, slots: Sequence[int]) -> Prefill:
        """All committed positions of the given requests, as a prefill."""
        features, following, positions, kv_slots, last = [], [], [], [], []
        for slot in slots:
            text = self.texts[slot]
            for position in range(len(text) - 1):
                features.append([feature(text[: position + 1])])
                following.append(text[position + 1])
                positions.append(position)
                kv_slots.append(int(self.table[slot, position]))
            last.append(len(positions) - 1)
        return Prefill(
            torch.tensor(features, dtype=torch.float64),
            torch.zeros(len(features), 0),
            torch.tensor(following),
            torch.tensor(positions),
            torch.tensor(kv_slots),
            torch.tensor(last),
            torch.tensor([self.texts[slot][-1] for slot in slots]),
            [*slots],
            [len(self.texts[slot]) - 1 for slot in slots],
        )


class FakeTarget:
    def __init__(self, world: World, max_steps: int = 1):
        self.world = world
        self.widths: list[int] = []
        self.max_steps = lambda: max_steps
        self.said: dict[int, list[int]] = {}  # tokens of a round's earlier steps, by slot
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}  # as of CUDA graphs, by shape

    def verify(self, rows: Rows, proposal: Proposal) -> Verified:
        num_rows, width = proposal.tokens.shape
        self.widths.append(width)
        logits = torch.zeros(num_rows, width, VOCAB)
        features = self.buffers.setdefault((num_rows, width), torch.zeros(num_rows, width, 1, dtype=torch.float64))
        for row in range(num_rows):
            slot = int(rows.slots[row])
            committed = self.world.texts[slot][:-1]
            said = self.said.get(slot, [])[: int(rows.prefix_lens[row]) - len(committed)]
            self.said[slot] = [*said, *proposal.tokens[row].tolist()]
            text = [*committed, *said]
            for column in range(width):
                text = [*text, int(proposal.tokens[row, column])]
                logits[row, column, next_token(text)] = 5.0
                features[row, column] = feature(text)
        return Verified(logits.argmax(-1), logits, features, torch.zeros(num_rows, width, 0))


class FakeDrafter:
    """Fails if its context is not exactly the committed text.

    Without `sees_next`, entries do not depend on the next token, like DFlash's.
    """

    def __init__(
        self, name: str, num_drafts: int, world: World, skill: float, seed: int = 0, *, sees_next: bool = True
    ):
        self.name = name
        self.num_drafts = num_drafts
        self.world = world
        self.skill = skill
        self.sees_next = sees_next
        self.random = random.Random(f"{name}{seed}")
        self.fails = lambda slot: False  # request slots whose drafts are not finite
        self.entries: dict[int, tuple[float, int, int]] = {}  # KV slot -> feature, next token, position

    def entry(self, feature: float, next_token: int, position: int) -> tuple[float, int, int]:
        return (feature, next_token if self.sees_next else -1, position)

    def ingest(self, entries: Entries) -> None:
        for i, kv_slot in enumerate(entries.kv_slots.tolist()):
            feature, next_token = float(entries.features[i, 0]), int(entries.next_tokens[i])
            self.entries[kv_slot] = self.entry(feature, next_token, int(entries.positions[i]))

    def draft(self, rows: Rows, last: torch.Tensor) -> Drafts:
        tokens = torch.tensor([self.draft_row(rows, row, float(last[row, 0])) for row in range(len(rows.slots))])
        return Drafts(tokens, torch.tensor([not self.fails(slot) for slot in rows.host.slots]))

    def draft_row(self, rows: Rows, row: int, last: float) -> list[int]:
        slot = int(rows.slots[row])
        text = self.world.texts[slot]
        assert int(rows.anchors[row]) == text[-1]
        assert int(rows.prefix_lens[row]) == len(text) - 1
        for position in range(len(text) - 1):
            kv_slot = int(self.world.table[slot, position])
            exact = self.entry(feature(text[: position + 1]), text[position + 1], position)
            assert self.entries.get(kv_slot) == exact, f"{self.name} reads position {position} wrong"
        assert last == feature(text[:-1])
        drafts: list[int] = []
        for _ in range(self.num_drafts):
            right = next_token([*text, *drafts])
            drafts.append(right if self.random.random() < self.skill else self.random.randrange(VOCAB))
        # Like a real drafter, leave entries of the drafts in the slots after the committed ones.
        for column in range(1, rows.kv_slots.shape[1]):
            self.entries[int(rows.kv_slots[row, column])] = (-1.0, -1, -1)
        return drafts
