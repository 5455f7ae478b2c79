"""Focal and Global Distillation (FGD, Yang et al., CVPR 2022) on the maps of the neck.

    loss = fg + bg + attention + global, level by level, each image by itself, averaged over the batch

Where the paper and its published code differ, `docs/method-notes.md` says which is followed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.attention import channel_attention, spatial_attention
from yoloxkd.kd.functional.fused import differences, pooled, shifted_error
from yoloxkd.kd.functional.masks import BoxCells, box_cells, box_parts, excluded_cells
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.ops.constants import constant
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName, Tap

ImageSize = tuple[int, int] | Tensor


class FGDConfig(KDConfig):
    """Keys of `kd` for FGD; `kd_defaults("fgd", FAMILY)` has those of a detector family."""

    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True)

    tau: float = published("fgd", "tau", gt=0, description="temperature of both attentions")
    alpha: float = published("fgd", "alpha", ge=0, description="weight of the foreground features")
    beta: float = published("fgd", "beta", ge=0, description="weight of the background features")
    gamma: float = published("fgd", "gamma", ge=0, description="weight of the attention maps")
    lambda_: float = published("fgd", "lambda", ge=0, alias="lambda", description="weight of the global relation")
    focal: bool = Field(True, description="foreground, background and attention terms")
    global_: bool = Field(True, alias="global", description="global relation term")
    spatial_attention: bool = Field(True, description="weight cells by the teacher's attention, and imitate it")
    channel_attention: bool = Field(True, description="weight channels by the teacher's attention, and imitate it")
    relation: Literal["gc", "nonlocal"] = Field("gc", description="block of the global term")
    scale_by_area: bool = Field(False, description="divide by current over nominal input area (multi-scale training)")


@without_autocast
def fgd_masks(
    boxes: Tensor, rows: Tensor, size: tuple[int, int], image_size: ImageSize, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Foreground weights and background weights of a level's cells: (B, h, w) each. FGD eq. (2) to (4).

    boxes       (B, G, 4) px; rows (B, G) bool, boxes that count
    size        (h, w) of the level; image_size (H, W) px of the network input, or one an image as (B, 2)
    excluded    (B, h, w) bool, cells that are neither foreground nor background
    A box covers the cells floor(x1 w/W) to ceil(x2 w/W), both included, and weighs them 1 over the cells it would cover
    on an unbounded map; the largest weight (smallest box) wins. Background cells weigh 1 over their number.
    """
    return _focal_masks(box_cells(boxes, size, image_size), rows, excluded)


def _focal_masks(cells: BoxCells, rows: Tensor, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    """`fgd_masks` of boxes whose cells are known."""
    rectangle, in_rows, in_columns = cells
    weight = 1.0 / (rectangle[..., 2:] - rectangle[..., :2] + 1).prod(-1).clamp_min(1.0)
    weighted = (in_rows & rows[..., None]) * weight[..., None]
    images, boxes, size = len(rows), rows.shape[1], (in_rows.shape[2], in_columns.shape[2])
    foreground = weighted.new_zeros(images, *size)
    for part in box_parts(boxes, foreground.numel(), foreground.device):
        foreground = torch.maximum(foreground, (weighted[:, part, :, None] * in_columns[:, part, None, :]).amax(1))
    background = (foreground == 0).to(foreground.dtype)
    if excluded is not None:
        foreground = foreground.masked_fill(excluded, 0.0)
        background = background.masked_fill(excluded, 0.0)
    return foreground, background / background.sum((1, 2), keepdim=True).clamp_min(1.0)


@without_autocast
def fgd_focal_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    tau: float,
    *,
    spatial: bool = True,
    channel: bool = True,
    context: tuple[nn.Module, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Terms fg, bg and attention of a level before their weights, averaged over images. FGD eq. (9) and (10).

    With the student's and the teacher's `GlobalContext` in `context`, global as well: `fgd_relation` in the same passes over the maps.

    Args:
        student, teacher: (B, C, h, w), the student's after its adapter
        foreground, background: (B, h, w) of `fgd_masks`
        spatial, channel: without one, cells or channels weigh alike and that attention is not imitated
    """
    student_map, teacher_map = full_precision(student).flatten(2), full_precision(teacher).detach().flatten(2)
    images = student_map.shape[0]
    a_teacher, p_teacher = _attention(teacher_map, tau, spatial, channel)
    difference = differences(student_map, teacher_map, a_teacher)
    error = difference.error
    foreground, background = foreground.flatten(1).to(error.dtype), background.flatten(1).to(error.dtype)
    distances = []
    if p_teacher is not None:
        distances.append((p_teacher - spatial_attention(difference.cells, tau)).abs().sum())
        error = error * p_teacher
    if channel:
        distances.append((a_teacher - channel_attention(difference.channels, tau)).abs().sum())
    sums = {
        "fg": (foreground * error).sum(),
        "bg": (background * error).sum(),
        "attention": sum(distances[1:], distances[0]) if distances else error.new_zeros(()),
    }
    if context is not None:
        shift = (context[0](student) - context[1](teacher.detach())).flatten(1)
        sums["global"] = difference.shifted(shift, student_map.shape[2])
    return dict(zip(sums, (torch.stack(list(sums.values())) / images).unbind(), strict=True))


def _attention(teacher_map: Tensor, tau: float, spatial: bool, channel: bool) -> tuple[Tensor, Tensor | None]:
    """The teacher's attention (B, C) over channels, ones without, and (B, N) over cells, None without: of a map (B, C, N)."""
    if not (spatial or channel):
        return teacher_map.new_ones(teacher_map.shape[:2]), None
    strength = teacher_map.abs()
    a_teacher = channel_attention(strength.mean(2), tau) if channel else teacher_map.new_ones(teacher_map.shape[:2])
    return a_teacher, spatial_attention(strength.mean(1), tau) if spatial else None


class GlobalContext(nn.Module):
    """What a map says as a whole, for every cell to add: W2 ReLU(LayerNorm(W1 context)). GcBlock of FGD eq. (12).

    The context is the mean of the cells weighted by a softmax over one logit a cell. W2 starts at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.logit = nn.Conv2d(channels, 1, 1, bias=False)  # a bias would not reach past the softmax
        self.squeeze = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.logit.weight, mode="fan_in")
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def context(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C)"""
        return pooled(x.flatten(2), self.logit.weight.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 1, 1)"""
        vector: Tensor = self.expand(F.relu(self.norm(self.squeeze(self.context(x)))))
        return vector[..., None, None]


class NonLocal(nn.Module):
    """What each cell says about all others: W3 attention(W_q x, W_k x, W_v x), embedded Gaussian with scaled products.

    The ablation's alternative to `GlobalContext` (Wang et al., Non-local Neural Networks, 2018). W3 starts at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.query, self.key, self.value = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.expand = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)"""
        q, k, v = (conv(x).flatten(2).transpose(1, 2) for conv in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.expand(mixed.unflatten(2, x.shape[2:]))
        return out


@without_autocast
def fgd_relation(student: Tensor, teacher: Tensor, student_block: nn.Module, teacher_block: nn.Module) -> Tensor:
    """Sum of (R_T(F_T) - R_S(F_S))² with R(F) = F + block(F), averaged over images, before lambda. FGD eq. (12).

    student, teacher (B, C, h, w). Both blocks are trained; the teacher's map carries no gradient.
    """
    student, teacher = full_precision(student), full_precision(teacher).detach()
    shift = student_block(student) - teacher_block(teacher)
    return shifted_error(student.flatten(2), teacher.flatten(2), shift.flatten(2)) / student.shape[0]


class FGD(Distiller):
    """FGD on every paired level of the neck."""

    Config = FGDConfig
    name: ClassVar[str] = "fgd"

    def __init__(self, cfg: FGDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.needs = frozenset({Tap.NECK})
        self.adapters = Adapters(pairing, self.needs)
        self.student_blocks, self.teacher_blocks = nn.ModuleDict(), nn.ModuleDict()
        attends = cfg.spatial_attention or cfg.channel_attention
        weights = {
            "fg": cfg.alpha if cfg.focal else 0.0,
            "bg": cfg.beta if cfg.focal else 0.0,
            "attention": cfg.gamma if cfg.focal and attends else 0.0,
            "global": cfg.lambda_ if cfg.global_ else 0.0,
        }
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)
        if "global" in self.weights:
            block: type[GlobalContext | NonLocal] = GlobalContext if cfg.relation == "gc" else NonLocal
            for level in pairing.levels:
                channels = pairing.channels(Tap.NECK, level)[1]
                self.student_blocks[f"s{level.stride}"] = block(channels)
                self.teacher_blocks[f"s{level.stride}"] = block(channels)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        if not self.terms:
            return {}
        share = self._area_ratio(step.student.image_size)
        terms = [self._level(step, level) for level in self.pairing.levels]
        values = torch.stack([of_level[term] for of_level in terms for term in self.weights])
        weights = tuple(weight / share for weight in self.weights.values()) * len(terms)
        values = values * constant(weights, values.dtype, values.device)
        return {term: Loss(value) for term, value in zip(self.terms, values.unbind(), strict=True)}

    def maps(self, step: Step[DetectorOutput]) -> dict[str, Tensor]:
        """Foreground and background weights, and the teacher's spatial attention."""
        out: dict[str, Tensor] = {}
        for level in self.pairing.levels:
            teacher_map = full_precision(step.maps(Tap.NECK, level)[1])
            size = (teacher_map.shape[2], teacher_map.shape[3])
            foreground, background = self._masks(step, size)
            attention = spatial_attention(teacher_map.abs().mean(1).flatten(1), self.cfg.tau).unflatten(1, size)
            weight_maps = {"foreground": foreground, "background": background, "attention": attention}
            out |= {f"{what}, stride {level.stride}": value for what, value in weight_maps.items()}
        return out

    def _level(self, step: Step[DetectorOutput], level: LevelPair) -> dict[str, Tensor]:
        """The terms of one level before their weights."""
        student_map, teacher_map = step.maps(Tap.NECK, level)
        student_map = self.adapters(student_map, teacher_map, Tap.NECK, level)
        teacher_map = full_precision(teacher_map)
        terms: dict[str, Tensor] = {}
        key = f"s{level.stride}"
        blocks = (self.student_blocks[key], self.teacher_blocks[key]) if "global" in self.weights else None
        if self.weights.keys() - {"global"}:
            size = (teacher_map.shape[2], teacher_map.shape[3])
            masks = self._masks(step, size)
            cfg = self.cfg
            terms = fgd_focal_terms(
                student_map,
                teacher_map,
                *masks,
                cfg.tau,
                spatial=cfg.spatial_attention,
                channel=cfg.channel_attention,
                context=blocks if cfg.relation == "gc" else None,
            )
        if blocks is not None and "global" not in terms:
            terms["global"] = fgd_relation(student_map, teacher_map, *blocks)
        return terms

    def _masks(self, step: Step[DetectorOutput], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Foreground and background weights (B, h, w) of a map of the teacher's."""
        targets, image_size = step.batch.targets, step.teacher.image_size
        cells = box_cells(targets.boxes, size, image_size)
        return _focal_masks(cells, targets.mask, excluded_cells(step.batch, size, image_size, cells))

    def _area_ratio(self, image_size: tuple[int, int]) -> float:
        """Current over nominal input area, the divisor of the authors' YOLOX branch; 1 when it is not asked for."""
        if not self.cfg.scale_by_area or self.pairing.nominal_size is None:
            return 1.0
        return image_size[0] * image_size[1] / self.pairing.nominal_size**2
