"""Routing policies, one per file, created by name.

A policy is called once per round for the whole batch. It decides for each row independently or, if it weighs costs, for
the batch as a whole. It decides on the host, from numbers that it keeps by request slot. Signals from the target's
logits or hidden states are computed on the device and reach the host with the round's copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from whiflash_sglang.core.round import Router
from whiflash_sglang.routing.artefact import DEFAULT_BASE, NeuralRouter, load_router
from whiflash_sglang.routing.calibration import Calibration, load_calibration
from whiflash_sglang.routing.costs import RoundCosts
from whiflash_sglang.routing.exploration import ScoredRouter, TrialRouter
from whiflash_sglang.routing.identity import Identity
from whiflash_sglang.routing.priors import Priors, load_priors
from whiflash_sglang.routing.score import Score
from whiflash_sglang.startup.config import DEFAULT_ENTROPY_THRESHOLD, LEARNED, WhiFlashConfig


@dataclass(frozen=True)
class Learned:
    """Learned files of the served models; None if not given."""

    neural: NeuralRouter | None = None
    calibration: Calibration | None = None
    priors: Priors | None = None
    identity: Identity | None = None  # of the served models

    @classmethod
    def load(cls, config: WhiFlashConfig, target_path: str) -> Learned:
        """Read the files that `config` names. Raises CheckpointError if one does not fit the models."""
        if config.neural_router_path is None and config.calibration is None and config.priors is None:
            return cls()
        identity = Identity.of(target_path, config.draft_paths, config.eagle_steps)
        neural = calibration = None
        if config.neural_router_path is not None:
            positive, threshold = config.positive_drafter, config.neural_router_threshold
            if config.weighs_costs and threshold is None:
                threshold = 0.0  # unused, but a bare file requires one
            neural = load_router(config.neural_router_path, identity, positive, threshold)
        if config.calibration is not None:
            calibration = load_calibration(config.calibration, identity)
        priors = None
        if config.priors is not None:
            priors = Priors() if config.priors == LEARNED else load_priors(config.priors, config.router, identity)
        return cls(neural, calibration, priors, identity)


def create_router(
    config: WhiFlashConfig, num_slots: int, learned: Learned | None = None, costs: RoundCosts | None = None
) -> Router:
    """Create the router that `--whiflash-router` names, for `num_slots` request slots.

    `costs` may be filled later: routers that weigh costs read them in `route`.
    """
    kind, _, argument = config.router.partition(":")
    if kind in _SCORED:
        learned = learned or Learned()
        router = _scored(config, num_slots, learned, costs)
        return router if learned.priors is None else TrialRouter(router, learned.priors, usual_lengths(learned)["df"])
    return _FACTORIES[kind](config, argument, num_slots)


def usual_lengths(learned: Learned) -> dict[str, float]:
    """Mean acceptance length by drafter: the calibration's, else the router's, else `DEFAULT_BASE`."""
    known = learned.calibration or learned.neural
    lengths = {} if known is None else known.acceptance_length
    return {name: lengths.get(name, DEFAULT_BASE) for name in ("df", "e3")}


def _scored(config: WhiFlashConfig, num_slots: int, learned: Learned, costs: RoundCosts | None) -> ScoredRouter:
    from whiflash_sglang.routing.cost_aware import CostAwareRouter
    from whiflash_sglang.routing.threshold import ThresholdRouter
    from whiflash_sglang.routing.yields import Yields

    score, threshold = _SCORED[config.router](config, num_slots, learned)
    if not config.weighs_costs:
        return ThresholdRouter(score, threshold)
    if costs is None:
        raise ValueError("this router needs a cost table")
    return CostAwareRouter(score, costs, Yields(usual_lengths(learned)))


def _entropy(config: WhiFlashConfig, num_slots: int, learned: Learned) -> tuple[Score, float]:
    from whiflash_sglang.routing.entropy import EntropyGain, EntropyScore

    calibration = learned.calibration
    if config.weighs_costs and calibration is not None:
        return EntropyGain(num_slots, calibration.edges, calibration.gains), 0.0
    default = DEFAULT_ENTROPY_THRESHOLD if calibration is None else calibration.entropy_threshold
    return EntropyScore(num_slots), default if config.entropy_threshold is None else config.entropy_threshold


def _neural(config: WhiFlashConfig, num_slots: int, learned: Learned) -> tuple[Score, float]:
    from whiflash_sglang.routing.neural import NeuralScore

    router, calibration = learned.neural, learned.calibration
    if router is None:
        raise ValueError("the neural router is not loaded")
    threshold = router.e3_threshold
    if config.neural_router_threshold is None and calibration is not None and calibration.neural_threshold is not None:
        threshold = calibration.neural_threshold
    return NeuralScore(router.e3_network, num_slots), threshold


def _fixed(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.routing.fixed import FixedRouter

    return FixedRouter(argument)


def _alternate(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.routing.schedule import AlternateRouter

    return AlternateRouter(config.drafter_names, num_slots)


def _random(config: WhiFlashConfig, argument: str, num_slots: int) -> Router:
    from whiflash_sglang.routing.schedule import RandomRouter

    return RandomRouter(config.drafter_names, int(argument))


_SCORED = {"entropy": _entropy, "neural": _neural}
_FACTORIES = {"fixed": _fixed, "alternate": _alternate, "random": _random}
