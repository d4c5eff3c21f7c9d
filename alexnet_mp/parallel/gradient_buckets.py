"""Times the all-reduces of gradients, which DistributedDataParallel sends in buckets."""

# Without `from __future__ import annotations`: DistributedDataParallel compares a hook's
# annotations with the classes themselves.

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from alexnet_mp.parallel.meter import Exchange, Meter


def time_buckets(replica: DistributedDataParallel, group: dist.ProcessGroup, meter: Meter) -> None:
    """From now on `meter.exchanges`, where it is a list, gets each all-reduce of a bucket.

    Its `layer` names the layers whose gradients the bucket holds. Gradients are averaged over
    `group` as before. DistributedDataParallel takes one such hook and keeps it.
    """
    size = dist.get_world_size(group)
    layers = {
        parameter: next(reversed(name.split(".")[:-1]), name)
        for name, parameter in replica.module.named_parameters()
    }
    through_host = dist.get_backend(group) == "gloo"

    def reduce(_: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        device_waits = buffer.is_cuda and not through_host
        sent = meter.timestamp(device_waits)
        work: Any = dist.all_reduce(buffer.div_(size), group=group, async_op=True)
        names = dict.fromkeys(layers[parameter] for parameter in bucket.parameters())

        def arrive(future: Future[list[Tensor]]) -> Tensor:
            if meter.exchanges is not None:
                now = meter.timestamp(device_waits)
                # A ring sends 2 (n - 1) parts of n, and there are n - 1 peers.
                count, label = 2 * buffer.nbytes // size, ", ".join(names)
                meter.exchanges.append(
                    Exchange(label, "backward", "data", count, sent, now, now, now)
                )
            return future.value()[0]

        done: Future[Tensor] = work.get_future().then(arrive)
        return done

    replica.register_comm_hook(None, reduce)
