"""Kernels for accelerators, each beside a plain torch reference of the same signature. Never imported on a CPU."""
