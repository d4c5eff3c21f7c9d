"""Imported by the fork server, so that ranks do not each pay for it again.

Reading a command line fills tyro's caches; the pictures bring matplotlib, which a run imports at
its end. An error here is left to the ranks, which meet it again and report it.
"""

import contextlib

with contextlib.suppress(Exception):
    import alexnet_mp.plotting.curves  # noqa: F401  (for its matplotlib)
    from alexnet_mp.cli.parser import parse_train

    parse_train(["--threads", "1"])
