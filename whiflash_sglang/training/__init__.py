"""Offline work: training of small targets and both kinds of drafters, their evaluation, models without weights.

Imports `core`, `routing`, `startup`, `launch_server` and the client package `whiflash_workloads`; nothing of SGLang.
"""
