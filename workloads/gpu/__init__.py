"""What `scripts/bench_gpu.py` measures on: models without weights, forced acceptance, and the criteria."""
