"""`python -m alexnet_mp COMMAND [flags]`, and the same under torchrun: `torchrun --nproc_per_node=2
-m alexnet_mp train`."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the seconds that torch takes to import leaves no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from alexnet_mp.cli.commands import main

if __name__ == "__main__":
    main(sys.argv[1:])
