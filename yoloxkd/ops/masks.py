"""Instance masks: IoU on tensors; run lengths and polygons as `instance_masks` has them."""

from __future__ import annotations

from torch import Tensor

from yoloxkd.instance_masks import decode_rle as decode_rle
from yoloxkd.instance_masks import encode_rle as encode_rle
from yoloxkd.instance_masks import rasterize_polygons as rasterize_polygons


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """(M, H, W) and (N, H, W) bool -> (M, N) float32, intersection over union; two empty masks overlap by 0."""
    one, other = a.flatten(1).float(), b.flatten(1).float()
    intersection = one @ other.T
    union = one.sum(1, keepdim=True) + other.sum(1) - intersection
    return intersection / union.clamp(min=1)
