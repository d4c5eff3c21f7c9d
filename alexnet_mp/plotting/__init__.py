"""Pictures from arrays and records. Imports no other room. Start with `curves.py`."""
