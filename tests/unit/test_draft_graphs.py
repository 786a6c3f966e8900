"""Drafting as CUDA graphs gives the drafts that it gives eagerly: on graphs that are recorded and replayed on a CPU
(`tests/pretend_graph.py`), with attention that plans on the device and with one that plans on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from tests.pretend_graph import CaptureError, PretendGraphs
from whiflash_sglang.core.types import Drafts, HostRows, Rows
from whiflash_sglang.drafters import graphs
from whiflash_sglang.drafters.dflash import DFlashDrafter
from whiflash_sglang.drafters.eagle3 import Eagle3Drafter
from whiflash_sglang.drafters.graphs import runs
from whiflash_sglang.drafters.runner import DraftRunner

SLOTS, CONTEXT, HIDDEN, VOCAB, NUM_DRAFTS = 6, 24, 8, 11, 3
SIZES = (1, 2, 4)
KINDS = {"df": DFlashDrafter, "e3": Eagle3Drafter}


class Attention:
    """Tells the model below which entries each row reads; keeps to what SGLang's backends promise.

    Planned for a graph, it keeps what it was told where the graph will look for it. One that plans on the host looks at
    lengths on the host only.
    """

    def __init__(self, plans_on_host: bool):
        self.needs_cpu_seq_lens = plans_on_host
        self.read: tuple[torch.Tensor, torch.Tensor] | None = None  # lengths and slots [rows] of the next forward

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.lens, self.slots = torch.zeros(2, max_bs, dtype=torch.int64)

    def init_forward_metadata(self, batch: Any) -> None:
        self.read = self.known_lens(batch), batch.req_pool_indices

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        size = batch.batch_size
        self.lens[:size].copy_(self.known_lens(batch))
        self.slots[:size].copy_(batch.req_pool_indices)
        if in_capture:
            assert len(batch.positions) == size * batch.spec_info.draft_token_num
            self.read = self.lens[:size], self.slots[:size]

    def known_lens(self, batch: Any) -> torch.Tensor:
        return batch.seq_lens_cpu if self.needs_cpu_seq_lens else batch.seq_lens

    def init_forward_metadata_in_graph(self, batch: Any) -> None:
        pass

    def on_after_cuda_graph_warmup(self) -> None:
        pass


class Model:
    """Writes an entry for each query and answers with a mixture of all entries that its row may read."""

    def __init__(self, attention: Attention):
        torch.manual_seed(0)
        self.attention = attention
        self.embedding, self.head = torch.randn(VOCAB, HIDDEN), torch.randn(HIDDEN, VOCAB)
        self.entries = torch.randn(1 + SLOTS * CONTEXT, HIDDEN)
        self.kv_table = 1 + torch.arange(SLOTS * CONTEXT).view(SLOTS, CONTEXT)

    def get_input_embeddings(self) -> Any:
        return lambda tokens: self.embedding[tokens]

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, input_embeds: Any) -> Any:
        features = batch.spec_info.hidden_states
        queries = self.embedding[input_ids] if input_embeds is None else input_embeds
        queries = queries + 0.1 * positions[:, None] + (0 if features is None else features)
        self.entries.index_copy_(0, batch.out_cache_loc, queries)
        lens, slots = self.attention.read
        size = batch.spec_info.draft_token_num
        readable = torch.arange(CONTEXT) < lens[:, None] + size
        seen = self.entries[self.kv_table[slots]].masked_fill(~readable[..., None], 0).sum(dim=1)
        hidden = torch.sin(queries + seen.repeat_interleave(size, dim=0, output_size=len(queries)))
        return SimpleNamespace(hidden_states=hidden, next_token_logits=hidden @ self.head)


def drafter(kind: str, attention: Attention, sizes: tuple[int, ...]) -> Any:
    """A drafter over the model above, without a checkpoint."""
    model = Model(attention)
    runner_of_model = SimpleNamespace(model=model, attn_backend=attention, device="cpu", dtype=torch.float32)
    runner = DraftRunner(None, SimpleNamespace(model_runner=runner_of_model), None, model, sizes)
    made = KINDS[kind].__new__(KINDS[kind])
    vars(made).update(runner=runner, num_drafts=NUM_DRAFTS)
    if kind == "df":
        made.block = torch.full((1, 1 + NUM_DRAFTS), 5)
        made.head = SimpleNamespace(best=lambda hidden: (hidden @ model.head).argmax(dim=-1))
        made.fill = runs(runner, made.propose, num_queries=1 + NUM_DRAFTS, num_entries=1 + NUM_DRAFTS)
    else:
        made.fuse = lambda features: features
        made.token_ids = torch.randperm(VOCAB)
        made.link = NUM_DRAFTS if graphs.is_one_graph(runner) else 1
        made.chain = runs(runner, made.propose, num_queries=1, num_entries=made.link, hidden_size=HIDDEN)
    return made


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[PretendGraphs]:
    """Captures are pretended ones, and collected here."""
    made: list[PretendGraphs] = []

    @contextmanager
    def capturing(model_runner: Any) -> Iterator[PretendGraphs]:
        made.append(PretendGraphs())
        yield made[-1]

    monkeypatch.setattr(graphs, "capturing", capturing)
    return made


def rows(model: Model, slots: list[int], lens: list[int]) -> Rows:
    """Requests with so many committed positions."""
    index, ends = torch.tensor(slots), torch.tensor(lens)
    window = torch.arange(-1, 1 + NUM_DRAFTS)
    anchors = (index + ends) % VOCAB
    return Rows(index, anchors, ends, model.kv_table[index[:, None], ends[:, None] + window], HostRows(slots, lens))


def draft(made: Any, slots: list[int], lens: list[int]) -> tuple[Drafts, torch.Tensor]:
    """Drafts, and the entries that drafting left."""
    with torch.inference_mode():
        last = torch.stack([torch.full((HIDDEN,), 0.01 * slot) for slot in slots])
        drafts = made.draft(rows(made.runner.model, slots, lens), last)
        return Drafts(*(part.clone() for part in drafts)), made.runner.model.entries[1:].clone()


@pytest.mark.parametrize("plans_on_host", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_draft_as_eager_forwards_do(captured: list[PretendGraphs], kind: str, plans_on_host: bool) -> None:
    """Batches that fill a graph, that have to be filled up, and that none is large enough for."""
    plain = drafter(kind, Attention(plans_on_host), sizes=())
    graphed = drafter(kind, Attention(plans_on_host), sizes=SIZES)
    batches = [([3, 1, 4], [9, 2, 17]), ([2], [12]), ([0, 5, 1, 3], [1, 7, 3, 10]), ([4, 3], [18, 11])]
    batches += [([0, 1, 2, 3, 4], [2, 4, 13, 12, 19]), ([1, 2, 5], [5, 14, 8])]
    for slots, lens in batches:
        (expected, entries), (drafts, left) = draft(plain, slots, lens), draft(graphed, slots, lens)
        assert drafts.tokens.tolist() == expected.tokens.tolist(), (slots, lens)
        assert torch.equal(left, entries), "what was written where"
        assert drafts.finite.tolist() == [True] * len(slots)
    assert len(captured) == 1, "one capture, at start"
    links = NUM_DRAFTS if kind == "e3" and plans_on_host else 1
    assert [key.size for key in captured[0].replays] == [size for size in (4, 1, 4, 2, 4) for _ in range(links)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_fill_up_a_batch_say_nothing_about_the_drafter(captured: list[PretendGraphs], kind: str) -> None:
    """They read what lies in slots of nobody, which may be anything."""
    made = drafter(kind, Attention(plans_on_host=False), sizes=(4,))
    model = made.runner.model
    model.entries[model.kv_table[0, 0]] = torch.nan  # read by rows of slot 0, as the fillers are
    drafts, _ = draft(made, [2, 3], [4, 5])
    assert drafts.finite.tolist() == [True, True]
    model.entries[model.kv_table[3, 1]] = torch.nan
    drafts, _ = draft(made, [2, 3], [4, 5])
    assert drafts.finite.tolist() == [True, False], "the row itself, and no other"


def test_a_chain_whose_attention_is_planned_on_the_host_is_no_graph(captured: list[PretendGraphs]) -> None:
    """What the two kinds of backends are told apart for: one that plans on the host, taken for the other."""
    attention = Attention(plans_on_host=True)
    attention.known_lens = lambda batch: torch.tensor(batch.seq_lens.tolist())  # type: ignore[method-assign]
    attention.needs_cpu_seq_lens = False
    with pytest.raises(CaptureError):
        drafter("e3", attention, sizes=(1,))
