"""Trained networks put to use: evaluation, prediction, the pictures of a finished run.

Imports every room but cli. Start with `ensemble.py`, then `evaluate.py` and `predict.py`.
"""
