"""Operations that PyTorch lacks, or has slow: response norm, 2012 dropout, conv1 over blocks, crop.

It imports config only. Start with `response_norm.py`; `cpu_kernels.py` and `csrc/` are its fast path
on a CPU, `compile.py` on a GPU.
"""
