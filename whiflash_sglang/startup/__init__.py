"""What is read and refused before a model is loaded: flags, checkpoints, ports, memory.

Imports `core.errors`. Imports neither torch nor SGLang, so a refusal takes a second or two.
"""
