"""Bounds of SGLang's numeric flags, checked before anything is imported or loaded.

    check(given)        # flag -> values, as text from the command line or as SGLang's parser returns them

SGLang validates few of them. The rest fail after minutes of loading with a traceback that names no flag, or are
silently accepted. The table covers every numeric flag of SGLang's parser; a test enforces that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from whiflash_sglang.core.errors import ConfigError

_MULTIPLES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(k|M|G|T|Ki|Mi|Gi|Ti)")


class Bound(NamedTuple):
    """Numbers from `low` to `high`, inclusive unless `open`."""

    low: float
    high: float = math.inf
    whole: bool = True
    open: bool = False
    suffixes: bool = False  # 64k, 8Ki

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.low == -math.inf:
            return kind
        if self.high == math.inf:
            return f"{kind} {'>' if self.open else '>='} {self.low:g}"
        if self.open:
            return f"{kind} above {self.low:g} and below {self.high:g}"
        return (
            f"{kind} from {self.low:g} to {self.high:.0f}"
            if self.whole
            else f"{kind} from {self.low:g} to {self.high:g}"
        )

    def number(self, value: object) -> float:
        """Parse `value`. Raises ValueError if it is not a number, not whole, or out of bounds."""
        text = str(value).strip()
        if self.suffixes and (match := _SIZE.fullmatch(text)):
            text = str(int(Decimal(match[1]) * _MULTIPLES[match[2]]))
        number = int(text) if self.whole else float(text)
        inside = self.low < number < self.high if self.open else self.low <= number <= self.high
        if not (inside and math.isfinite(number)):
            raise ValueError("out of bounds")
        return number


COUNT, SIZE, TOKENS = Bound(1), Bound(0), Bound(1, suffixes=True)
OR_OFF = Bound(-1)  # -1 switches it off
PORT = Bound(1, 65535)
ANY, SEED = Bound(-math.inf), Bound(0, 2**32 - 1)
SHARE, FRACTION = Bound(0, 1, whole=False), Bound(0, 1, whole=False, open=True)
AMOUNT, POSITIVE = Bound(0, whole=False), Bound(0, whole=False, open=True)

_FLAGS: Mapping[Bound, str] = {
    PORT: """
        --port --nccl-port --grpc-port --metrics-port --smg-http-sidecar-port --disaggregation-bootstrap-port
        --encoder-bootstrap-port --engine-info-bootstrap-port
        --remote-instance-weight-loader-seed-instance-service-port
    """,
    TOKENS: "--context-length --max-total-tokens --max-prefill-tokens",
    COUNT: """
        --max-running-requests --max-queued-requests --prefill-max-requests --page-size --num-continuous-decode-steps
        --tokenizer-worker-num --detokenizer-worker-num --scheduler-recv-interval --stream-interval --batch-notify-size
        --load-snapshot-publish-interval --decode-log-interval --dynamic-batch-tokenizer-batch-size --dist-timeout
        --weight-cache-timeout --weight-loader-prefetch-num-threads --prefill-delayer-max-delay-passes
        --nnodes --tensor-parallel-size --pipeline-parallel-size --data-parallel-size --expert-parallel-size
        --decode-context-parallel-size --attention-context-parallel-size --moe-data-parallel-size --dwdp-size
        --moe-dense-tp-size --max-ep-size --elastic-ep-initial-size --gpu-id-step --pp-max-micro-batch-size
        --eplb-rebalance-num-iterations --eplb-rebalance-layers-per-chunk --fuseep-mode --sm-group-num
        --asr-max-buffer-seconds --asr-max-concurrent-sessions
        --cuda-graph-max-bs-decode --cuda-graph-max-bs-prefill --cuda-graph-bs-decode --cuda-graph-bs-prefill
        --cuda-graph-max-bs --cuda-graph-bs --piecewise-cuda-graph-tokens --piecewise-cuda-graph-max-tokens
        --torch-compile-max-bs --triton-attention-num-kv-splits --triton-attention-split-tile-size
        --speculative-num-steps --speculative-eagle-topk --speculative-num-draft-tokens
        --speculative-dflash-block-size --speculative-dspark-block-size --speculative-draft-window-size
        --speculative-dflash-draft-window-size --speculative-ngram-min-bfs-breadth --speculative-ngram-max-bfs-breadth
        --speculative-ngram-max-trie-depth --speculative-ngram-capacity --speculative-ngram-external-corpus-max-tokens
        --max-mamba-cache-size --mamba-track-interval --int8-mamba-ckpt-size --linear-replayssm-cache-len
        --max-lora-rank --max-loaded-loras --max-loras-per-batch --max-lora-chunk-size
        --offload-num-in-group --offload-prefetch-step --kt-cpuinfer --kt-threadpool-count
        --disaggregation-decode-polling-interval
    """,
    SIZE: """
        --node-rank --base-gpu-id --numa-node --gc-threshold --pp-async-batch-depth --log-requests-level
        --priority-scheduling-preemption-threshold --min-free-slots-delay --kv-canary-sweep-interval
        --debug-tensor-dump-layers --decoupled-spec-rank --speculative-ngram-external-sam-budget
        --ep-num-redundant-experts --elastic-ep-join-rank-offset --mamba-cache-philox-rounds --hicache-size
        --mm-processor-worker-num --mm-io-worker-num --cpu-offload-gb --kt-num-gpu-experts
        --kt-max-deferred-experts-per-token --num-reserved-decode-tokens --disaggregation-decode-extra-slots
        --optimistic-prefill-attempts
    """,
    OR_OFF: """
        --chunked-prefill-size --expert-distribution-recorder-buffer-size --mamba-max-states-per-path
        --offload-group-size
    """,
    ANY: "--default-priority-value",
    SEED: "--random-seed",
    FRACTION: "--mem-fraction-static",
    SHARE: """
        --swa-full-tokens-ratio --eplb-min-rebalancing-utilization-threshold --tbo-token-distribution-threshold
        --speculative-accept-threshold-single --speculative-accept-threshold-acc
        --prefill-delayer-token-usage-low-watermark
    """,
    AMOUNT: """
        --schedule-conservativeness --gc-warning-threshold-secs --lora-drain-wait-threshold
        --dynamic-batch-tokenizer-batch-timeout --bucket-time-to-first-token --bucket-inter-token-latency
        --bucket-e2e-request-latency --prefill-delayer-forward-passes-buckets --prefill-delayer-wait-seconds-buckets
        --prefill-delayer-queue-min-ratio --prefill-delayer-max-delay-ms
    """,
    POSITIVE: """
        --watchdog-timeout --soft-watchdog-timeout --elastic-ep-scale-timeout --mamba-full-memory-ratio
        --hicache-ratio
    """,
}

BOUNDS: Mapping[str, Bound] = {flag: bound for bound, flags in _FLAGS.items() for flag in flags.split()}


def check(given: Mapping[str, Sequence[object]]) -> None:
    """Raise ConfigError for the first value out of bounds. `given`: flag -> its values."""
    for flag, values in given.items():
        if flag in BOUNDS and not values:
            raise ConfigError(flag, None, "has no value", f"give {BOUNDS[flag]}")
        if flag in BOUNDS:
            for value in values:
                number(flag, value)
    if "--node-rank" in given:
        rank, nodes = (
            number("--node-rank", given["--node-rank"][-1]),
            number("--nnodes", (given.get("--nnodes") or [1])[-1]),
        )
        if rank >= nodes:
            raise ConfigError(
                "--node-rank", f"{rank:g}", f"there are {nodes:g} nodes, counted from 0", "raise --nnodes"
            )


def number(flag: str, value: object) -> float:
    """Parse a flag's value. Raises ConfigError if it is out of bounds."""
    bound = BOUNDS[flag]
    try:
        return bound.number(value)
    except (ValueError, OverflowError):
        raise ConfigError(flag, value, f"must be {bound}", "correct the value or drop the flag") from None
