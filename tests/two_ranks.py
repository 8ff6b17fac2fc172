"""One of two processes that share gradients by gloo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def rank_of_two(rank: int, folder: str) -> Iterator[None]:
    """Ends the process where nothing was raised.

    gloo's threads may still hold tensors when the interpreter ends, and then abort the process now
    and then (pytorch/pytorch#179291): the end of a process is not what is tested.
    """
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        yield
        dist.barrier()  # neither leaves while the other waits for it
    finally:
        dist.destroy_process_group()
    os._exit(0)
