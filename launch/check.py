#!/usr/bin/env python
"""Will training work on this machine, and how fast?

    torchrun --nproc_per_node=2 launch/check.py

`--help` lists the flags. Exit code 1 where a check fails; its row names the remedy.
"""

import sys

from alexnet_mp.cli.check import check
from alexnet_mp.cli.process import run_main

if __name__ == "__main__":
    run_main(lambda: check(sys.argv[1:]))
