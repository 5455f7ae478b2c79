"""What parts of an image are to each other: distances between regions (GID), and cells that read all cells (FKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.kd.functional.precision import full_precision, without_autocast

LEAST_SQUARE = 1e-12
"""Of a distance between two different regions."""
NORM_EPS = 1e-5
FEWEST = 3
"""Regions of an image that have a relation: two have one distance, which divided by its mean says nothing."""


@without_autocast
def relative_distances(features: Tensor, used: Tensor) -> Tensor:
    """Euclidean distances of regions, divided by their mean: features (B, k, D), used (B, k) bool -> (B, k, k) float64.

    0 on the diagonal and for regions that are not there. In float64: the squares of alike regions cancel in float32.
    """
    exact = features.double()
    squares = exact.square().sum(-1)
    product = torch.bmm(exact, exact.transpose(1, 2))
    distance = (squares[:, :, None] + squares[:, None] - 2 * product).clamp_min(LEAST_SQUARE).sqrt()
    apart = _pairs(used)
    distance = distance.masked_fill(~apart, 0.0)
    mean = distance.sum((1, 2)) / apart.sum((1, 2)).clamp_min(1)
    return distance / mean.clamp_min(LEAST_SQUARE)[:, None, None]


@without_autocast
def relation_error(student: Tensor, teacher: Tensor, used: Tensor) -> Tensor:
    """Mean over pairs of smooth L1 between the relative distances of both, image by image. GID section 3.3.

    student, teacher (B, k, D) features of the same regions, used (B, k) bool -> (B,); 0 with fewer than three regions
    """
    distances = [relative_distances(x, used) for x in (student, teacher.detach())]
    error = F.smooth_l1_loss(distances[0], distances[1], reduction="none").sum((1, 2)) / _pairs(used).sum(
        (1, 2)
    ).clamp_min(1)
    return error.masked_fill(used.sum(1) < FEWEST, 0.0).to(full_precision(student).dtype)


def _pairs(used: Tensor) -> Tensor:
    """(B, k) bool -> (B, k, k) bool: two different regions that are both there."""
    k = used.shape[1]
    return used[:, :, None] & used[:, None] & ~torch.eye(k, dtype=torch.bool, device=used.device)


class PooledNonLocal(nn.Module):
    """Every cell adds what it reads of all cells: F + norm(W_out(theta(F)ᵀ phi(F) g(F) / N)). FKD section 3.2.

    The dot-product form of Wang et al. (Non-local Neural Networks, 2018), without a softmax, over N cells of a map that is
    max-pooled. Without the softmax the product of phi and g can be taken first, so no matrix of cells by cells is made.

    The release normalizes over the batch; here each image is normalized by itself (the release with a batch of one), so
    that a batch in parts is the batch at once. Scale and shift start at zero: at first the block adds nothing.
    """

    def __init__(self, channels: int, inner: int, pool: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Linear(channels, inner) for _ in range(3))
        self.out = nn.Linear(inner, channels, bias=False)
        self.scale, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.pool = pool

    def read(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the cells read, before it is normalized, as two factors: (B, h w, inner) and (B, inner, C).

        Args:
            rows: (B, h w, C), cells of a map.
            size: (h, w).
        """
        h, w = size
        stacked = F.linear(rows, torch.cat([self.phi.weight, self.g.weight]), torch.cat([self.phi.bias, self.g.bias]))
        pooled = F.max_pool2d(stacked.transpose(1, 2).unflatten(2, size), (min(self.pool, h), min(self.pool, w)))
        phi, g = pooled.flatten(2).chunk(2, 1)
        mixed = torch.bmm(phi, g.transpose(1, 2)) / phi.shape[2]
        return self.theta(rows), mixed @ self.out.weight.t()

    def added(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What the block adds to the cells beside `shift`: two factors, (B, h w, inner) and (B, inner, C); arguments of `read`.

        Mean and variance of what is read follow from those of theta, which has fewer channels.
        """
        theta, values = self.read(rows, size)
        centered = theta - theta.mean(1, keepdim=True)
        covariance = torch.bmm(centered.transpose(1, 2), centered) / theta.shape[1]
        variance = (values * torch.bmm(covariance, values)).sum(1, keepdim=True).clamp_min(0)
        return centered, values * ((variance + NORM_EPS).rsqrt() * self.scale)

    def forward(self, rows: Tensor, size: tuple[int, int]) -> Tensor:
        """Cells of a map in rows (B, h w, C), and its size (h, w) -> (B, h w, C)."""
        return torch.baddbmm(rows + self.shift, *self.added(rows, size))


def related_difference(
    student: Tensor,
    teacher: Tensor,
    blocks: tuple[PooledNonLocal, PooledNonLocal],
    relation: nn.Linear,
    size: tuple[int, int],
) -> Tensor:
    """The student's cells after its block and `relation`, less the teacher's after its own: (B, h w, C).

    Written out, so that neither block's output is made: relation(S + shift + A B) - (T + shift' + A' B').

    Args:
        student, teacher: (B, h w, C), cells of maps in rows.
        blocks: the student's and the teacher's.
        size: (h, w).
    """
    student_block, teacher_block = blocks
    weight = relation.weight
    cells, values = student_block.added(student, size)
    teacher_cells, teacher_values = teacher_block.added(teacher, size)
    constant = relation.bias + weight @ student_block.shift - teacher_block.shift
    return torch.baddbmm(
        F.linear(student, weight, constant) - teacher,
        torch.cat([cells, teacher_cells], 2),
        torch.cat([values @ weight.t(), -teacher_values], 1),
    )
