"""Votes weighed by distance, and the distance beyond which neighbours say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from scfm.mapping.transfer import farthest_known, remoteness, votes


def test_near_neighbours_outvote_a_far_majority() -> None:
    distances = np.array([[0.1, 0.1, 0.9, 0.9, 0.9]], np.float32)
    shares = votes(distances, np.array([[1, 1, 0, 0, 0]]), 3)
    weights = np.exp(-(distances.astype(float) ** 2) / (2 * distances.astype(float).mean() ** 2))[0]
    np.testing.assert_allclose(shares, [[weights[2:].sum() / weights.sum(), weights[:2].sum() / weights.sum(), 0]])
    assert shares[0, 1] > shares[0, 0]


def test_votes_do_not_depend_on_the_scale_of_the_embedding() -> None:
    distances = np.array([[0.1, 0.2, 0.4]], np.float32)
    codes = np.array([[0, 1, 1]])
    np.testing.assert_allclose(votes(distances / 1024, codes, 2), votes(distances, codes, 2))


def test_identical_neighbours_vote_alike() -> None:
    np.testing.assert_allclose(votes(np.zeros((1, 4), np.float32), np.array([[0, 1, 1, 1]]), 2), [[0.25, 0.75]])


def test_missing_neighbours_have_no_vote() -> None:
    distances = np.array([[0.5, np.inf], [np.inf, np.inf]], np.float32)
    np.testing.assert_array_equal(votes(distances, np.array([[1, -1], [-1, -1]]), 2), [[0, 1], [0, 0]])


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_given_share_of_each_label_is_known(share: float) -> None:
    rng = np.random.default_rng(0)
    codes = np.arange(200) % 2
    distances = np.sort(rng.random((200, 6)) * np.where(codes == 0, 1, 3)[:, None], axis=1).astype(np.float32)
    remote = remoteness(distances, 3)
    limits = farthest_known(remote, codes, 2, share)
    for code in range(2):
        assert (remote[codes == code] <= limits[code]).mean() == pytest.approx(share)
    assert limits[1] > 2 * limits[0]


def test_a_label_of_few_cells_has_the_limit_of_the_whole_reference() -> None:
    remote = np.linspace(0, 1, 101, dtype=np.float32)
    codes = np.array([0] * 96 + [1] * 5)
    limits = farthest_known(remote, codes, 3, 0.5)
    np.testing.assert_allclose(limits, [0.47, 0.5, 0.5], atol=1e-6)
