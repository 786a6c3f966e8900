"""The scheduler-side runtime around a round: worker, verify forward, tensor-parallel ranks, metrics.

May import `core`, `routing`, `drafters`, `startup` and `bridge`.
"""
