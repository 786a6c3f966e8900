import os

import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# On a GPU too, the plain torch form is to be exact.
torch.backends.cuda.matmul.allow_tf32 = False
