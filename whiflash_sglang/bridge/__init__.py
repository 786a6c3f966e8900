"""All code that uses private or unstable names of SGLang: the algorithm, the hooks, the builders.

May import `core`, `startup` and `drafters.runner`, but not `serving`: `plugin.py` passes the worker in.
"""
