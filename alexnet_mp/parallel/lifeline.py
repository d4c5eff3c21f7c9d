"""Notices at once that a rank on another host has died: its connection closes.

Each rank waits in a thread for one message from the next rank, which that rank sends when it leaves
as it should. The system closes the connections of a process that has died, and then the wait ends
with an error instead. So the ranks of a host that has gone are noticed by the rank before them,
whose heartbeat tells all others.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

TAG = 1912
"""Keeps the message apart from the group's other ones."""


class Lifeline(threading.Thread):
    """From this rank to the next one, until `stop`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        rank: int,
        world_size: int,
        notice_closed: Callable[[int], None],
    ) -> None:
        """`group` is gloo's, of all ranks, and waits without a limit.

        `notice_closed` is called with the next rank when its connection has closed.
        """
        super().__init__(name="lifeline", daemon=True)
        self.group, self.notice_closed = group, notice_closed
        self.next, self.previous = (rank + 1) % world_size, (rank - 1) % world_size
        self._ended = False
        self._word = torch.zeros(1)
        # Asked for here: of a group's calls only the wait is made in another thread.
        self._arriving = dist.irecv(self._word, group=group, group_src=self.next, tag=TAG)

    def run(self) -> None:
        assert self._arriving is not None
        try:
            self._arriving.wait()
        except RuntimeError:
            if not self._ended:
                self.notice_closed(self.next)

    def stop(self) -> None:
        """Says goodbye to the rank before this one. A second call does nothing."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(RuntimeError):  # that rank may have left before
                dist.send(torch.ones(1), group=self.group, group_dst=self.previous, tag=TAG)
