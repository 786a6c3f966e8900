"""Tests that run kernels: on a GPU, or in Triton's interpreter, for which Triton has to be imported with
TRITON_INTERPRET=1. Elsewhere they are not collected; `tests/unit/test_kernels.py` runs them in a process of their own.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["test_*.py"]
