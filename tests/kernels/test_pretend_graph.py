"""Launches of Triton's interpreter in a recorded graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.kernels import DEVICE
from tests.kernels.test_ingest import rotary_table
from tests.pretend_graph import CaptureError, PretendGraph
from whiflash_sglang.drafters.ingest_kernel import Ingestion, ingest, reference

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")


@triton.jit
def scaled_kernel(source, target, scale, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size) * scale, mask=at < size)


def test_launches_are_replayed_in_order_with_their_numbers():
    x, target, scale, grid = torch.ones(6), torch.zeros(6), [3.0], [2]
    graph = PretendGraph()
    with torch.inference_mode(), graph.recording():
        shifted = x + 1
        scaled_kernel[lambda meta: (grid[0],)](shifted, target, scale[0], 6, BLOCK=4)
        result = target * 10
    assert [step.name for step in graph.steps] == ["add", "scaled_kernel", "mul"]
    assert not target.any()  # undone
    scale[0], grid[0] = 0.0, 1
    for value in (1.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert target.tolist() == [3 * (value + 1)] * 6
        assert result.tolist() == [30 * (value + 1)] * 6


def test_launches_outside_of_a_recording_are_not_recorded():
    graph = PretendGraph()
    with graph.recording():
        pass
    scaled_kernel[(1,)](torch.ones(2), target := torch.zeros(2), 2.0, 2, BLOCK=2)
    assert graph.steps == [] and target.tolist() == [2.0, 2.0]


def test_a_launch_keeps_nothing_that_it_was_given():
    x, target = torch.ones(2), torch.zeros(2)
    graph = PretendGraph()
    with graph.recording():
        scaled_kernel[(1,)](x, target, 2.0, 2, BLOCK=2)
    graph.replay()
    assert target.tolist() == [2.0, 2.0]
    del x
    with pytest.raises(CaptureError, match="scaled_kernel"):
        graph.replay()


def test_ingestion_is_the_same_replayed():
    """It writes at addresses that it was given as numbers."""
    pools = tuple(torch.zeros(9, 2, 16) for _ in range(2))
    made = Ingestion(weight=torch.randn(64, 24), epsilon=1e-5, pools=pools)
    x, table, slots, positions = torch.randn(3, 24), rotary_table(16), torch.arange(3), torch.arange(3)
    with torch.inference_mode():
        _ = made.addresses  # of the host's data, so not in the recording
        graph = PretendGraph()
        with graph.recording():
            ingest(made, (x,), table, positions, slots)
        x.copy_(torch.randn(3, 24))
        slots.copy_(torch.tensor([8, 4, 5]))
        positions.copy_(torch.tensor([7, 1, 30]))
        graph.replay()
        found = [pool[slots].clone() for pool in pools]
        reference(made, (x,), table, positions, slots)
        for pool, entries in zip(pools, found, strict=True):
            torch.testing.assert_close(entries, pool[slots], rtol=2e-5, atol=2e-5)
