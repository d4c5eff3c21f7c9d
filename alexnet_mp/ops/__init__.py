"""Operations that PyTorch lacks, or has slow: response norm, 2012 dropout, conv1 over blocks, crop.

It imports config only. Start with `response_norm.py`; `cpu_kernels.py` with `csrc/` is its fast
path on a CPU, `triton_kernels.py` on a GPU.
"""
