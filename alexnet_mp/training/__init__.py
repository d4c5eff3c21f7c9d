"""Training: the loop, one whole run, the optimizer and schedules, checkpoints.

Imports every room but inference and cli. Start with `trainer.py`.
"""
