"""Instance masks of regions (Mask R-CNN, He et al. 2017): the head, its targets and loss, and masks put into images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.two_stage.box_code import clip
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Loss

THRESHOLD = 0.5
"""A pixel or a target cell belongs to the mask from here on."""


class PlainBlock(nn.Module):
    """3x3 convolution with bias and ReLU, under the key `conv`."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class MaskHead(nn.Module):
    """Convolutions, a transposed convolution that doubles the size, and one channel a class; attributes as mmdetection's keys.

    channels: of the pooled maps; hidden: of the head
    """

    def __init__(self, channels: int, classes: int, *, hidden: int = 256, convs: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(PlainBlock(channels if i == 0 else hidden, hidden) for i in range(convs))
        self.upsample = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
        self.conv_logits = nn.Conv2d(hidden, classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, s, s) -> logits (N, K, 2 s, 2 s)."""
        for block in self.convs:
            pooled = block(pooled)
        y: Tensor = self.conv_logits(F.relu(self.upsample(pooled)))
        return y


@torch.no_grad()
def mask_targets(masks: Tensor, rows: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What the mask of each region should be: RoIAlign of the object's bitmap at scale 1, at least a half.

    Args:
        masks: (M, H, W) 0 or 1, bitmaps of the objects of a batch
        rows: (N,) int64, the bitmap that each region answers for
        boxes: (N, 4) px, the regions; they are cut at the bitmap
        size: cells of a side
    Returns:
        (N, size, size) bool
    """
    from torchvision.ops import roi_align

    boxes = full_precision(boxes)
    height, width = masks.shape[-2:]
    cut = clip(boxes[None], boxes.new_tensor([[width, height]]))[0]
    rois = torch.cat((rows.to(boxes.dtype).unsqueeze(-1), cut), 1)
    soft: Tensor = roi_align(masks.to(boxes.dtype).unsqueeze(1), rois, size, 1.0, 0, True)
    return soft[:, 0] >= THRESHOLD


def own_channel(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, K, s, s) of each region's own class: (N, s, s)."""
    index = labels.view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, index).squeeze(1)


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor, used: Tensor) -> Loss:
    """Binary cross entropy of the own class's channel, mean over the cells of the regions in use.

    logits (N, K, s, s), labels (N,) int64, targets (N, s, s) bool, used (N,) bool
    """
    own = own_channel(full_precision(logits), labels)
    entropy = F.binary_cross_entropy_with_logits(own, targets.to(own.dtype), reduction="none").mean((1, 2))
    return Loss(entropy.masked_fill(~used, 0).sum(), used.sum())


def paste_masks(probability: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of boxes put into an image, read bilinearly at pixel centers.

    Args:
        probability: (N, s, s), 0 to 1
        boxes: (N, 4) px
        height, width: px of the image
    Returns:
        (N, H, W) bool
    """
    boxes = full_precision(boxes)
    x1, y1, x2, y2 = boxes.split(1, dim=1)
    y = torch.arange(height, device=boxes.device, dtype=boxes.dtype) + 0.5
    x = torch.arange(width, device=boxes.device, dtype=boxes.dtype) + 0.5
    y, x = (y - y1) / (y2 - y1) * 2 - 1, (x - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    grid = torch.where(grid.isfinite(), grid, -2.0)
    soft = F.grid_sample(probability.to(boxes.dtype).unsqueeze(1), grid, align_corners=False)[:, 0]
    return soft >= THRESHOLD
