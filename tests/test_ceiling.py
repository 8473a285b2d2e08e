"""The rate of matrix products against which MFU is stated."""

from __future__ import annotations

import time

import pytest
import torch

from scfm.ceiling import matmul_ceiling, product_type, seconds_of


def test_seconds_are_those_of_one_call() -> None:
    calls: list[float] = []

    def call() -> None:
        time.sleep(0.01)
        calls.append(time.perf_counter())

    assert 0.01 <= seconds_of(call, torch.device("cpu"), calls=5) < 0.05
    assert len(calls) == 5


def test_a_ceiling_leaves_the_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    assert matmul_ceiling("cpu", torch.float32, size=64, seconds=0.0) > 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32", torch.float32), (32, torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_type_of_products(precision: str | int, dtype: torch.dtype) -> None:
    assert product_type(precision) == dtype
