"""Everything that touches SGLang's private or unstable names: the algorithm, the hooks, the builders.

May import `core`, `startup` and `drafters.runner`. Never imports `serving`: `plugin.py` passes the worker in.
"""
