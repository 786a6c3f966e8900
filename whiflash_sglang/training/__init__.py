"""Offline tools: train small targets, drafters and routers, evaluate them, and create models without weights.

Imports `core`, `routing`, `startup`, `launch_server` and the client package `whiflash_workloads`, but not SGLang.
"""
