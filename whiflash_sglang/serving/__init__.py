"""What runs in the scheduler's process around a round: the worker, the verify forward, ranks, figures.

May import `core`, `routing`, `drafters`, `startup` and `bridge`.
"""
