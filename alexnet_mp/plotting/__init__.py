"""Pictures from arrays and records, each written as a PNG file, and a page that holds them.

Imports no other room.

Start with `curves.py`; `kernels.py` and `predictions.py` draw the figures 3 and 4 of the paper,
`timeline.py` a training step.
"""
