"""Tests that run kernels, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1 before importing Triton). Otherwise
they are not collected; `tests/unit/test_kernels.py` runs them in a separate process.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["test_*.py"]
