"""Checks that run before a model is loaded: flags, checkpoints, ports, memory.

Imports `core.errors` but neither torch nor SGLang, so an error appears within a second or two.
"""
