"""torch keeps its threads through baselines and figures, whatever libraries start meanwhile."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from scfm.threads import same_threads


def threads_after_choosing_genes() -> tuple[int, int]:
    """Threads of torch, which had one before, and of numba; for a process of its own."""
    import numba
    import numpy as np
    from scipy.sparse import csr_matrix

    from scfm.baselines.hvg_pca import highly_variable

    torch.set_num_threads(1)
    torch.get_num_threads()  # torch settles its number when it is first asked, which would hide what happens here
    highly_variable(csr_matrix(np.random.default_rng(0).random((40, 30))), 5)
    return torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessPoolExecutor]:
    """A process in which numba has not started its threads, of which it will start two."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
        yield one


def test_choosing_genes_leaves_torch_its_threads(fresh: ProcessPoolExecutor) -> None:
    assert fresh.submit(threads_after_choosing_genes).result(timeout=120) == (1, 2)


def test_the_number_of_threads_is_given_back_where_something_fails() -> None:
    def fail() -> None:
        with same_threads():
            torch.set_num_threads(before + 1)
            raise ZeroDivisionError

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before
