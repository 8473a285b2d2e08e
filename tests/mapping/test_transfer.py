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
def test_the_given_share_of_the_reference_is_known(share: float) -> None:
    distances = np.sort(np.random.default_rng(0).random((200, 6)).astype(np.float32), axis=1)
    limit = farthest_known(distances, 3, share)
    assert (remoteness(distances, 3) <= limit).mean() == pytest.approx(share)
