"""kNN as a head: the labelled cells that vote are its weights, so that a zero-shot classifier is an ordinary model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Cosines of neighbouring cells differ by hundredths: the nearest then weighs a little more, and votes hardly ever tie
TEMPERATURE = 0.1


class NeighbourDecoder(nn.Module):
    """Classes of cells by a vote of the nearest reference cells, by cosine: (N, D) -> (N, n_out) logits.

    A neighbour of cosine s votes with exp(s / 0.1); the logit of a class is the logarithm of its votes, -inf without
    any. So softmax gives each class its share of the votes, and the energy -logsumexp is low where the reference is
    dense.

    Attributes:
        reference: (R, D) float32 embeddings of the reference cells, of length 1.
        labels: (R,) int64 class of each.
    """

    reference: Tensor
    labels: Tensor

    def __init__(self, width: int, n_out: int, references: int, neighbours: int) -> None:
        super().__init__()
        self.n_out, self.neighbours = n_out, min(neighbours, references)
        self.register_buffer("reference", torch.zeros(references, width))
        self.register_buffer("labels", torch.zeros(references, dtype=torch.int64))

    def learn(self, cells: Tensor, labels: Tensor) -> None:
        """Take over embeddings (R, D) of any length, and their classes (R,)."""
        self.reference.copy_(F.normalize(cells.float(), dim=-1))
        self.labels.copy_(labels)

    def forward(self, cells: Tensor) -> Tensor:
        cosine = F.normalize(cells.float(), dim=-1) @ self.reference.t()  # (N, R)
        near, which = cosine.topk(self.neighbours, dim=-1)  # (N, k)
        highest = near[:, :1]
        votes = ((near - highest) / TEMPERATURE).exp()
        sums = votes.new_zeros(len(cells), self.n_out).scatter_add(1, self.labels[which], votes)
        return sums.log() + highest / TEMPERATURE
