"""A detector of a few thousand weights that obeys the contract: two levels, BGR input, conv-norm pairs."""

from __future__ import annotations

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match, no_match
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps, Predictions
from yoloxkd.nn.detector import BoxCode, DetectorSpec, InputConvention
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Tap, Targets, task_losses


class TinyDetector(DenseDetector):
    """Two levels (strides 8 and 16); `bias` moves its scores up or down."""

    class Config(BaseModel):
        """Nothing to set."""

    family = "tiny"

    def __init__(self, names: list[str], seed: int = 0, bias: float = 0.0) -> None:
        super().__init__(self.Config(), names)
        torch.manual_seed(seed)
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=(8, 16),
            channels={Tap.NECK: {8: 16, 16: 16}},
            box_code=BoxCode("cells"),
            input=InputConvention(bgr=True),
        )
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

    def pyramid(self, x: Tensor) -> tuple[Maps, Maps]:
        fine = self.stem(x / 8)
        return (), (fine, self.down(fine))

    def tower(self, branch: Tap, maps: Maps, start: int = 0, stop: int | None = None) -> Maps:
        return maps

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        both = [self.head(x) for x in reg]
        return Predictions([x[:, 4:] for x in both], [x[:, :4] for x in both])

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        step = grid.point_strides[:, None]
        size = torch.exp(raw[..., 2:4].clamp(-3, 3)) * step * 3
        center = grid.points + raw[..., :2].tanh() * step
        return torch.cat([center - size / 2, center + size / 2], dim=2)

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        return no_match(*out.cls_logits.shape[:2], out.cls_logits.device)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        return task_losses(none=Loss(out.cls_logits.sum() * 0))
