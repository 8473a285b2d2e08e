"""The number of threads that torch computes with, kept from other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def same_threads() -> Iterator[None]:
    """Give torch back, after what happens inside, the number of threads that it had before.

    numba (in scanpy and umap-learn) starts its OpenMP pool with a thread per core, whatever OMP_NUM_THREADS says, and
    that number is then torch's too: what is trained later would cost other seconds than what was trained before.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
