"""A detector of a few thousand weights that obeys the contract: two levels, BGR input, conv-norm pairs."""

from __future__ import annotations

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from yoloxkd.nn.detector import DenseDetector, InputConvention, Taps
from yoloxkd.types import DenseOutput, Loss, Losses, Targets, task_losses


class TinyDetector(DenseDetector):
    """Two levels (strides 8 and 16); `bias` moves its scores up or down."""

    class Config(BaseModel):
        """Nothing to set."""

    family = "tiny"

    def __init__(self, names: list[str], seed: int = 0, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.names, self.levels = names, (8, 16)
        self.input = InputConvention(bgr=True)
        self.taps = Taps((16, 16), (16, 16), (16, 16))
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 8, 8, bias=False), nn.BatchNorm2d(16, eps=1e-3), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.head = nn.Conv2d(16, 4 + len(names), 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -3, 3)
                nn.init.uniform_(module.running_var, 200, 2000)
                nn.init.uniform_(module.weight, 0.5, 3)
        nn.init.normal_(self.head.weight, std=0.6)
        nn.init.normal_(self.head.bias, mean=bias, std=0.1)

    def dense(self, x: Tensor) -> DenseOutput:
        fine = self.stem(x / 8)
        coarse = self.down(fine)
        maps = (fine, coarse)
        flat = [self.head(f).flatten(2).transpose(1, 2) for f in maps]
        raw = torch.cat(flat, dim=1)
        points, strides = [], []
        for f, stride in zip(maps, self.levels, strict=True):
            h, w = f.shape[2], f.shape[3]
            y, x_ = torch.meshgrid(torch.arange(h, dtype=f.dtype), torch.arange(w, dtype=f.dtype), indexing="ij")
            points.append(torch.stack([x_, y], dim=2).reshape(-1, 2) * stride + stride / 2)
            strides.append(torch.full((h * w,), float(stride)))
        point, step = torch.cat(points), torch.cat(strides)
        size = torch.exp(raw[..., 2:4].clamp(-3, 3)) * step[:, None] * 3
        centre = point + raw[..., :2].tanh() * step[:, None]
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=2)
        sizes = tuple((f.shape[2], f.shape[3]) for f in maps)
        image_size = (x.shape[2], x.shape[3])
        return DenseOutput(
            maps, maps, maps, raw[..., 4:], raw[..., :4], boxes, None, point, step, sizes, self.levels, image_size
        )

    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        return task_losses(none=Loss(out.cls_logits.sum() * 0))

    def scores(self, out: DenseOutput) -> Tensor:
        return out.cls_logits.sigmoid()
