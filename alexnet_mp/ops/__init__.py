"""Operations that PyTorch lacks, or has slow: response norm, dropout as of 2012, conv1 over blocks, compiled kernels.

Imports config. Start with `response_norm.py`.
"""
