"""torchrun, but it kills a rank that has not ended PATIENCE seconds, not 30, after its signal."""

import sys
from typing import Any

PATIENCE = 5
"""Seconds."""

if __name__ == "__main__":
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api

    close = api.PContext.close

    def close_soon(self: Any, death_sig: Any = None, timeout: int = PATIENCE) -> None:
        close(self, death_sig, PATIENCE)

    api.PContext.close = close_soon
    sys.exit(run.main(sys.argv[1:]))
