"""How many steps the target may run in a round without drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from whiflash_sglang.serving.verifier import SGLangTarget


def steps(lengths: dict[int, int], has_grammar: bool = False, return_logprob: bool = False, **sampling: Any) -> int:
    """For requests with these maximum and present lengths."""
    orchestrator = SimpleNamespace(is_required=sampling.pop("penalties", False))
    of_sampling = {"penalizer_orchestrator": orchestrator, "has_custom_logit_processor": False, **sampling}
    requests = [
        SimpleNamespace(sampling_params=SimpleNamespace(max_new_tokens=most), output_ids=[0] * said)
        for most, said in lengths.items()
    ]
    target = SGLangTarget(None, 1, widths={})
    target.bind(
        SimpleNamespace(
            reqs=requests,
            has_grammar=has_grammar,
            return_logprob=return_logprob,
            sampling_info=SimpleNamespace(**of_sampling),
        )
    )
    return target.max_steps()


def test_steps_end_with_the_last_request_that_ends() -> None:
    assert steps({10: 7}) == 3
    assert steps({10: 9, 64: 60}) == 4
    assert steps({10: 10}) == 1


@pytest.mark.parametrize("asked", ["has_grammar", "return_logprob", "penalties", "has_custom_logit_processor"])
def test_one_step_where_logits_depend_on_the_text_before(asked: str) -> None:
    assert steps({100: 1}, **{asked: True}) == 1
