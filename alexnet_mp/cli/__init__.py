"""The command line: flags, errors, signals, exit codes. Imports every room.

Start with `parser.py`.
"""
