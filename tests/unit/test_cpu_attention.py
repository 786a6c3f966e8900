"""The CPU attention backend against a reference that computes one token at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from whiflash_sglang.cpu import metadata as metadata_module
from whiflash_sglang.cpu.attention import attend, check_layer, metadata_of
from whiflash_sglang.cpu.metadata import BlockMetadata, RaggedMetadata, block_metadata, ragged_metadata

HEAD_DIM = 8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Scene:
    """Random caches, a slot table in which no two requests share a slot, and queries for the new tokens."""

    def __init__(self, seed, prefix_lens, new_lens, kv_heads=2, groups=2, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        totals = [prefix + new for prefix, new in zip(prefix_lens, new_lens, strict=True)]
        num_slots = sum(totals) + 1
        self.prefix_lens, self.new_lens = prefix_lens, new_lens
        # Slots of nobody's hold NaN: reading one, even with a weight of zero, would show.
        self.k_cache = torch.full((num_slots + 7, kv_heads, HEAD_DIM), float("nan"), dtype=dtype)
        self.v_cache = self.k_cache.clone()
        filled = torch.randn(2, num_slots, kv_heads, HEAD_DIM, generator=generator)
        slots = torch.randperm(num_slots, generator=generator) + 3
        self.k_cache[slots], self.v_cache[slots] = filled[0].to(dtype), filled[1].to(dtype)
        self.request_rows = torch.randperm(len(totals) + 2, generator=generator)[: len(totals)]
        self.req_to_token = torch.zeros(len(totals) + 2, max(totals) + 5, dtype=torch.int32)
        for row, total in zip(self.request_rows.tolist(), totals, strict=True):
            self.req_to_token[row, :total] = slots[:total].to(torch.int32)
            slots = slots[total:]
        self.q = torch.randn(sum(new_lens), kv_heads * groups, HEAD_DIM, generator=generator).to(dtype)

    def block(self) -> BlockMetadata:
        return block_metadata(
            self.req_to_token, self.request_rows, torch.tensor(self.prefix_lens), width=self.new_lens[0]
        )

    def ragged(self) -> RaggedMetadata:
        return ragged_metadata(self.req_to_token, self.request_rows.tolist(), self.prefix_lens, self.new_lens)

    def attend(self, metadata, *, causal=True, window=-1):
        scale = HEAD_DIM**-0.5
        return attend(self.q, self.k_cache, self.v_cache, metadata, scale=scale, causal=causal, window=window)

    def reference(self, *, causal=True, window=-1):
        """Softmax attention, one new token and one head at a time, in float64."""
        outputs, token = torch.empty(self.q.shape, dtype=torch.float64), 0
        for row, prefix, new in zip(self.request_rows.tolist(), self.prefix_lens, self.new_lens, strict=True):
            for offset in range(new):
                first = max(0, prefix + offset - window) if window >= 0 else 0
                last = prefix + offset if causal else prefix + new - 1
                slots = self.req_to_token[row, first : last + 1].long()
                for head in range(self.q.shape[1]):
                    kv_head = head // (self.q.shape[1] // self.k_cache.shape[1])
                    keys, values = self.k_cache[slots, kv_head].double(), self.v_cache[slots, kv_head].double()
                    weights = torch.softmax(keys @ self.q[token, head].double() / math.sqrt(HEAD_DIM), dim=0)
                    outputs[token, head] = weights @ values
                token += 1
        return outputs


def assert_close(output, expected, dtype):
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


seeds = st.integers(0, 10_000)
dtypes = st.sampled_from(list(TOLERANCE))
heads = st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 4), (4, 3)])
prefixes = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(seeds, prefixes, st.integers(1, 9), heads, dtypes, st.booleans(), st.sampled_from([-1, 0, 3, 100]))
def test_block_equals_the_reference(seed, prefix_lens, width, heads, dtype, causal, window):
    """Decode (width 1), verify (causal) and draft block (non-causal), alone and together, with and without window."""
    scene = Scene(seed, prefix_lens, [width] * len(prefix_lens), *heads, dtype=dtype)
    assert_close(
        scene.attend(scene.block(), causal=causal, window=window), scene.reference(causal=causal, window=window), dtype
    )


@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=4),
    heads,
    dtypes,
    st.booleans(),
    st.sampled_from([-1, 0, 5]),
    st.sampled_from([1, 7, 512]),
)
def test_ragged_equals_the_reference(seed, lengths, heads, dtype, causal, window, query_chunk):
    """Prompts after cached prefixes, in one chunk of queries and in several."""
    scene = Scene(seed, [prefix for prefix, _ in lengths], [new for _, new in lengths], *heads, dtype=dtype)
    expected = scene.reference(causal=causal, window=window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata_module, "QUERY_CHUNK", query_chunk)
        assert_close(scene.attend(scene.ragged(), causal=causal, window=window), expected, dtype)


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.integers(0, 600), min_size=2, max_size=6), st.integers(1, 8), st.booleans())
def test_a_row_does_not_depend_on_its_neighbours(seed, prefix_lens, width, causal):
    """The same request alone and in a batch of longer ones: equal to float32 rounding."""
    scene = Scene(seed, prefix_lens, [width] * len(prefix_lens))
    together = scene.attend(scene.block(), causal=causal)
    for index, prefix_len in enumerate(prefix_lens):
        alone = block_metadata(
            scene.req_to_token, scene.request_rows[index : index + 1], torch.tensor([prefix_len]), width
        )
        rows = slice(index * width, (index + 1) * width)
        output = attend(scene.q[rows], scene.k_cache, scene.v_cache, alone, scale=HEAD_DIM**-0.5, causal=causal)
        torch.testing.assert_close(together[rows], output, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [-1, 0, 100, 5000])
@pytest.mark.parametrize("causal", [True, False])
def test_long_contexts_cross_the_kernel_blocks(causal, window):
    """Contexts longer than the kernel's blocks of entries, with whole blocks hidden by a window or by padding."""
    scene = Scene(0, [2600, 3, 1500], [4, 4, 4])
    assert_close(
        scene.attend(scene.block(), causal=causal, window=window),
        scene.reference(causal=causal, window=window),
        torch.float32,
    )
    assert_close(
        scene.attend(scene.ragged(), causal=causal, window=window),
        scene.reference(causal=causal, window=window),
        torch.float32,
    )


def test_masks_are_built_once_per_forward_and_large_ones_not_kept(monkeypatch):
    scene = Scene(0, [5, 9], [3, 3])
    block = scene.block()
    scene.attend(block)
    (mask,) = block.masks.values()
    scene.attend(block)
    assert list(block.masks.values()) == [mask]
    ragged = scene.ragged()
    monkeypatch.setattr(metadata_module, "MAX_KEPT_MASK", 30)
    scene.attend(ragged)  # [3, 8] fits, [3, 12] does not
    assert [tuple(kept.shape) for kept in ragged.masks.values()] == [(3, 8)]


def batch(mode, **fields):
    return SimpleNamespace(forward_mode=mode, req_pool_indices=torch.tensor([0, 1]), batch_size=2, **fields)


def test_lengths_are_read_as_each_mode_means_them():
    """`seq_lens` counts the new tokens in a decode and does not in a verify."""
    table = torch.arange(60, dtype=torch.int32).view(2, 30)
    decode = metadata_of(table, batch(ForwardMode.DECODE, seq_lens=torch.tensor([5, 7])))
    assert (decode.width, decode.prefix_lens.flatten().tolist(), decode.slots.shape[1]) == (1, [4, 6], 7)
    verify = metadata_of(
        table, batch(ForwardMode.TARGET_VERIFY, seq_lens=torch.tensor([5, 7]), out_cache_loc=torch.zeros(8))
    )
    assert (verify.width, verify.prefix_lens.flatten().tolist(), verify.slots.shape[1]) == (4, [5, 7], 11)
    # The shorter request's padding repeats its own last slot.
    assert verify.slots[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    lengths = {"extend_seq_lens": torch.tensor([2, 9]), "extend_prefix_lens": torch.tensor([3, 0])}
    extend = metadata_of(table, batch(ForwardMode.EXTEND, **lengths))
    assert [(segment.start, segment.end, segment.prefix_len) for segment in extend.segments] == [(0, 2, 3), (2, 11, 0)]
    assert extend.segments[1].slots.tolist() == list(range(30, 39))


def test_a_ragged_verify_is_refused():
    fields = {"seq_lens": torch.tensor([5, 7]), "out_cache_loc": torch.zeros(7)}
    with pytest.raises(ValueError, match="2 requests has 7 tokens"):
        metadata_of(torch.zeros(2, 30, dtype=torch.int32), batch(ForwardMode.TARGET_VERIFY, **fields))


def layer(**fields):
    plain = {
        "layer_id": 3,
        "is_cross_attention": False,
        "logit_cap": 0.0,
        "use_irope": False,
        "xai_temperature_len": -1,
        "attn_type": AttentionType.DECODER,
    }
    return SimpleNamespace(**{**plain, **fields})


def test_unsupported_layers_are_refused_by_name():
    check_layer(layer(), {})
    check_layer(layer(attn_type=AttentionType.ENCODER_ONLY), {})
    with pytest.raises(ValueError, match=r"layer 3 needs logit_cap=30"):
        check_layer(layer(logit_cap=30.0), {})
    with pytest.raises(ValueError, match="cross attention"):
        check_layer(layer(is_cross_attention=True), {})
    with pytest.raises(ValueError, match="sinks"):
        check_layer(layer(), {"sinks": torch.zeros(2)})
