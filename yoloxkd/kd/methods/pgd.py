"""Prediction-Guided Distillation (PGD, Yang et al., ECCV 2022) on the first feature maps of the head towers.

Where the paper and its published code differ, `docs/method-notes.md` says which is followed.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.attention import spatial_attention
from yoloxkd.kd.functional.fused import local_error_and_attention, local_error_attention_and_strength
from yoloxkd.kd.functional.importance import (
    BY_BEST,
    COVARIANCE_EPS,
    Order,
    Predictions,
    Strategy,
    inside_any,
    pgd_weights,
    touched_by_any,
)
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.neck import TAPS, Branch
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.ops.points import within_content
from yoloxkd.types import DenseOutput, Grid, Loss, Losses, LossName

MIN_DEVIATION = 0.1
"""Of the root mean square deviation of a map's channels."""


class PGDConfig(KDConfig):
    """Keys of `kd` for PGD."""

    foreground: Strategy = published(
        "pgd", "foreground", description="how foreground locations are chosen and weighted (PGD Table 5)"
    )
    branches: list[Branch] = published(
        "pgd", "branches", min_length=1, description="maps that are distilled (PGD Table 7)"
    )
    k: int = published("pgd", "k", ge=1, description="locations of an object, over all levels")
    tau: float = published("pgd", "tau", gt=0, description="temperature of both attentions")
    alpha: float = published("pgd", "alpha", ge=0, description="weight of the foreground features (neck, cls)")
    beta: float | None = published(
        "pgd", "beta", ge=0, description="weight of the background features; None: alpha / 2"
    )
    gamma: float | None = published(
        "pgd", "gamma", ge=0, description="weight of the regression features; None: 1.6 alpha"
    )
    delta: float = published("pgd", "delta", ge=0, description="weight of the attention maps")
    xi_cls: float = published(
        "pgd", "xi_cls", ge=0, le=1, description="localization's part in the quality, for neck and cls"
    )
    xi_reg: float = published("pgd", "xi_reg", ge=0, le=1, description="the same for reg")
    order: Order = Field("paper", description="paper: best inside a box; release: best anywhere, then cut to the box")
    level_weights: list[float] = published("pgd", "level_weights", description="of neck and cls features, finest first")
    covariance_eps: float = Field(COVARIANCE_EPS, ge=0, description="px², keeps the Gaussian of few locations finite")
    k_share: float | None = Field(
        None, gt=0, le=1, description="k is at most this share of the locations inside an object's box, and at least 1"
    )
    normalize: Literal["level", "image"] = Field(
        "level",
        description="foreground and background are means over the cells of a level, or of an image's levels together",
    )
    channel_scale: Literal["none", "std"] = Field(
        "none", description="std: both maps are divided by the teacher's standard deviation of each channel of an image"
    )
    statistics: Literal["running", "batch"] = Field(
        "running",
        description="of the batch norms behind the teacher's maps; batch: those of the batch, as the student's",
    )

    @field_validator("foreground", mode="before")
    @classmethod
    def _both_spellings(cls, value: object) -> object:
        return "centre" if value == "center" else value

    @model_validator(mode="after")
    def _a_share_of_something(self) -> Self:
        if self.k_share is not None and self.foreground not in BY_BEST:
            raise ValueError(
                f"k_share limits how many of the best locations are taken, and foreground {self.foreground} takes them all: "
                f"set foreground to {', '.join(BY_BEST[:-1])} or {BY_BEST[-1]}, or leave k_share out"
            )
        return self


@without_autocast
def pgd_cls_terms(
    student: Tensor, teacher: Tensor, weight: Tensor, background: Tensor, tau: float
) -> dict[str, Tensor]:
    """Terms fg, bg and attention of a classification (or neck) map before their weights, averaged over images.

    student, teacher    (B, C, h, w)
    weight, background  (B, h, w), each divided here by the number of its non-zero cells, image by image
    PGD eq. (5) and (8) with the normalizations of the published code: attention sums the spatial part over cells, and
    averages the channel part over cells.
    """
    student_map, teacher_map = _cells(student), _cells(teacher.detach())
    error, distance, strength = local_error_attention_and_strength(student_map, teacher_map, tau)
    images, cells = error.shape
    p_teacher = spatial_attention(teacher_map.abs().mean(2), tau)
    spatial = (p_teacher - spatial_attention(strength, tau)).abs().sum()
    error = error * p_teacher
    return {
        "fg": (_shared(weight, error) * error).sum() / images,
        "bg": (_shared(background, error) * error).sum() / images,
        "attention": (spatial + distance.sum() / cells) / images,
    }


@without_autocast
def pgd_reg_terms(student: Tensor, teacher: Tensor, weight: Tensor, tau: float) -> dict[str, Tensor]:
    """Terms fea and attention of a regression map before their weights, averaged over all images of the batch.

    student, teacher (B, C, h, w); weight (B, h, w)
    PGD eq. (6) and (9) with the normalizations of the published code: fea is the mean over channels, attention the sum, and
    both are means over the cells of an image with a weight; an image without such cells counts as 0.
    """
    student_map, teacher_map = _cells(student), _cells(teacher.detach())
    error, distance = local_error_and_attention(student_map, teacher_map, tau)
    images, _, channels = student_map.shape
    return {
        "fea": (_shared(weight, error) * error).sum() / (images * channels),
        "attention": (_shared(weight != 0, error) * distance).sum() / images,
    }


def _cells(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C), contiguous: a view of a map in channels_last, a copy of another."""
    return full_precision(x).flatten(2).transpose(1, 2).contiguous()


def image_shares(weights: list[Tensor]) -> list[Tensor]:
    """Weights (B, h, w) of an image's levels times the part that each level has of their non-zero cells together.

    Divided by the number of the level's own, they are divided by that of all levels.
    """
    cells = torch.stack([(weight.flatten(1) != 0).sum(1) for weight in weights])
    shares = cells.double() / cells.sum(0).clamp_min(1)
    return [weight * share[:, None, None] for weight, share in zip(weights, shares, strict=True)]


@without_autocast
def scaled_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (B, C, h, w) over the teacher's standard deviation of each channel over the cells of an image.

    A deviation is at least `MIN_DEVIATION` times the root mean square of the image's channels: one that hardly varies would
    be raised without a bound.
    """
    student, teacher = full_precision(student), full_precision(teacher.detach())
    deviation = teacher.std((2, 3), correction=0, keepdim=True)
    least = MIN_DEVIATION * deviation.square().mean(1, keepdim=True).sqrt()
    deviation = torch.where(least > 0, deviation.maximum(least), 1.0)  # 1: a map without any variation stays as it is
    return student / deviation, teacher / deviation


def _shared(weight: Tensor, like: Tensor) -> Tensor:
    """(B, h, w) divided by the number of its non-zero cells, image by image: (B, h w). PGD eq. (4)."""
    flat = weight.flatten(1)
    return flat.to(like.dtype) / (flat != 0).sum(1, keepdim=True).clamp_min(1)


class PGD(Distiller):
    """PGD on every paired level of the chosen branches."""

    Config = PGDConfig
    name: ClassVar[str] = "pgd"

    def __init__(self, cfg: PGDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        for who, spec in (("student", pairing.student), ("teacher", pairing.teacher)):
            if spec.box_code.kind == "masks":
                raise UserError(
                    f"--kd pgd weighs every location of a map by the box predicted there, and the {who} predicts masks and no "
                    f"boxes; choose a {who} that predicts boxes, or another --kd"
                )
            if not spec.stable_locations:
                raise UserError(
                    "--kd pgd weighs every location of a map by the box predicted there, and the second stage of the "
                    f"{who} predicts boxes of proposals, which belong to no location; choose a dense {who}, or another --kd"
                )
        self.cfg = cfg
        self.branches: tuple[Branch, ...] = tuple(dict.fromkeys(cfg.branches))
        taps = [TAPS[branch] for branch in self.branches]
        self.needs = frozenset(taps)
        self.batch_statistics = cfg.statistics == "batch"
        if len(cfg.level_weights) < len(pairing.levels):
            raise UserError(
                f"kd.level_weights has {len(cfg.level_weights)} numbers for {len(pairing.levels)} paired levels; "
                "give one for each"
            )
        self.adapters = Adapters(pairing, taps)
        beta = cfg.alpha / 2 if cfg.beta is None else cfg.beta
        gamma = 1.6 * cfg.alpha if cfg.gamma is None else cfg.gamma
        dense = {"fg": cfg.alpha, "bg": beta, "attention": cfg.delta}
        weights = {"neck": dense, "cls": dense, "reg": {"fea": gamma, "attention": cfg.delta}}
        self.weights = {b: {t: w for t, w in weights[b].items() if w > 0} for b in self.branches}
        self.terms = tuple(
            LossName(self.name, f"{branch}_{term}", level.stride)
            for level in pairing.levels
            for branch in self.branches
            for term in self.weights[branch]
        )
        self.register_buffer("classes", pairing.classes.clone(), persistent=False)
        self.register_buffer("taught", pairing.taught.clone(), persistent=False)
        self.classes: Tensor
        self.taught: Tensor

    def compare(self, step: Step[DenseOutput]) -> Losses:
        weights, background = self.regions(step)
        if self.cfg.normalize == "image":
            weights = {branch: image_shares(maps) for branch, maps in weights.items()}
            background = image_shares(background)
        out: Losses = {}
        for i, level in enumerate(self.pairing.levels):
            for branch in self.branches:
                terms = self._level(branch, level, step, weights[branch][i], background[i])
                factor = 1.0 if branch == "reg" else self.cfg.level_weights[i]
                for term, weight in self.weights[branch].items():
                    scale = weight if term == "attention" else weight * factor
                    out[LossName(self.name, f"{branch}_{term}", level.stride)] = Loss(terms[term] * scale)
        return out

    def maps(self, step: Step[DenseOutput]) -> dict[str, Tensor]:
        """Foreground weights of each branch, and the background."""
        weights, background = self.regions(step)
        foregrounds: dict[str, list[Tensor]] = {f"{branch} foreground": maps for branch, maps in weights.items()}
        strides = [level.stride for level in self.pairing.levels]
        return {
            f"{what}, stride {stride}": value
            for what, maps in (foregrounds | {"background": background}).items()
            for stride, value in zip(strides, maps, strict=True)
        }

    def regions(self, step: Step[DenseOutput]) -> tuple[dict[Branch, list[Tensor]], list[Tensor]]:
        """Foreground weights by branch and background of each paired level: (B, h, w) each, not yet normalized.

        Where a cell has several predictions, its quality is the largest of theirs (PGD section 3.2), for each object.
        Only locations of paired levels are candidates: one that is chosen elsewhere would teach nothing. Objects that
        another teacher answers for are neither foreground nor background.
        """
        cfg, batch, targets, teacher = self.cfg, step.batch, step.batch.targets, step.teacher
        levels = [level.teacher for level in self.pairing.levels]
        grid, slices = teacher.grid.of_levels(levels).of_cells(), teacher.grid.slices()
        probability = step.models.teacher.class_probability(teacher)
        predictions = Predictions(
            grid.points,
            torch.cat([probability[:, slices[i]] for i in levels], 1),
            torch.cat([teacher.boxes[:, slices[i]] for i in levels], 1),
        )
        ignored = touched_by_any(predictions.points, targets.boxes, targets.ignore)
        counted = within_content(predictions.points, batch.content) & ~ignored
        xi = tuple(cfg.xi_reg if branch == "reg" else cfg.xi_cls for branch in self.branches)
        values = tuple(dict.fromkeys(xi))
        importance = pgd_weights(
            predictions,
            targets.boxes,
            self.classes.to(targets.labels.device)[targets.labels],
            targets.mask & self.taught.to(targets.labels.device)[targets.labels],
            xi=values,
            k=cfg.k,
            k_share=cfg.k_share,
            strategy=cfg.foreground,
            order=cfg.order,
            eps=cfg.covariance_eps,
        )
        importance = importance * counted
        background = counted & ~inside_any(predictions.points, targets.boxes, targets.mask)
        by_branch = {b: _by_level(importance[values.index(x)], grid) for b, x in zip(self.branches, xi, strict=True)}
        return by_branch, _by_level(background.to(importance.dtype), grid)

    def _level(
        self,
        branch: Branch,
        level: LevelPair,
        step: Step[DenseOutput],
        weight: Tensor,
        background: Tensor,
    ) -> dict[str, Tensor]:
        tap = TAPS[branch]
        student_map, teacher_map = step.maps(tap, level)
        student_map = self.adapters(student_map, teacher_map, tap, level)
        if self.cfg.channel_scale == "std":
            student_map, teacher_map = scaled_channels(student_map, teacher_map)
        if branch == "reg":
            return pgd_reg_terms(student_map, teacher_map, weight, self.cfg.tau)
        return pgd_cls_terms(student_map, teacher_map, weight, background, self.cfg.tau)


def _by_level(values: Tensor, grid: Grid) -> list[Tensor]:
    """Values (B, A) of cells -> (B, h, w) a level."""
    return [level.squeeze(-1) for level in grid.by_level(values)]
