"""Lets every test module say `from ranks import run` and `import reference`: pytest's importlib mode adds no folder to sys.path."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent

sys.path[:0] = [path for path in (str(TESTS), str(TESTS.parent)) if path not in sys.path]
