"""Fit priors to collected replies, in which both drafters' acceptance is known at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from whiflash_sglang.routing.priors import Place, Priors
from whiflash_sglang.training.router_data import Record
from whiflash_sglang.training.text import SPANS
from whiflash_sglang.training.walk import by_worth, gather, round_starts, walk


def places(records: Sequence[Record]) -> list[Place]:
    """Context kind, span and tool of each position, [all positions]."""
    return [Place(r.context_kind, SPANS[span], r.tool) for r in records for span in r.positions.span]


def margin_of(records: Sequence[Record], gain: np.ndarray, ms: Mapping[str, float]) -> float:
    """Tokens that `e3` must gain to be worth its time, if rounds are chosen by `gain` [all positions]."""
    return walk(records, by_worth(records, gain, ms), ms).tokens_per_ms * (ms["e3"] - ms["df"])


def fit_priors(records: Sequence[Record], gain: np.ndarray, ms: Mapping[str, float]) -> Priors:
    """Fit the priors of a score that predicts `gain` [all positions], on the positions where rounds begin.

    A position where rounds of both drafters begin counts once.
    """
    difference = gather(records, "e3").astype(np.float64) - gather(records, "df")
    at = places(records)
    priors = Priors()
    for i in np.unique(round_starts(records)).tolist():
        priors.add(at[i], float(gain[i]), float(difference[i]))
    priors.settle(margin_of(records, gain, ms))
    return priors


def biases(records: Sequence[Record], priors: Priors) -> np.ndarray:
    """The bias of `priors` at every position, [all positions]."""
    return np.array([priors.bias(*place) for place in places(records)])
