"""Files with weights: our own checkpoint and, one module a format, those of other programs.

A file becomes a `NetworkFile`: configuration, tensors, classes, preprocessing. Formats are told by
content, and nothing in a file is executed. Imports config and model. Start with `convert.py`.
"""
