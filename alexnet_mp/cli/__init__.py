"""The command line: commands, flags, errors, signals, exit codes. Imports every room.

Start with `commands.py`, the table of commands; each has a module of its own. `parser.py` turns
flags into a configuration or request, `process.py` runs a command and decides how the process ends.
"""
