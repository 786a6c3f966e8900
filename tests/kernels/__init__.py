import os

import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# Keep torch's reference exact on a GPU, too.
torch.backends.cuda.matmul.allow_tf32 = False
