"""What `bash tools/on_gpu.sh` measures on a machine with one GPU; `stages.py` is the whole of it."""
