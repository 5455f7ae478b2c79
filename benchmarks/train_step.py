"""A training step of YOLOX against pixeltable-yolox's, from the same weights, on the same batch, with the same losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.peers import use_peers
from benchmarks.report import Row, run_script
from benchmarks.roofline import convolution_peak, step_flops
from benchmarks.scenes import CLASSES, batch_of, detector
from benchmarks.steps_of import training_step
from benchmarks.timing import Spread, alternate, ratio
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.ops.boxes import to_center
from yoloxkd.types import Batch

SHAPES = {"yolox-nano": (0.33, 0.25, True), "yolox-s": (0.33, 0.50, False), "yolox-m": (0.67, 0.75, False)}


def official_step(
    ours: DenseDetector, name: str, batch: Batch, layout: torch.memory_format, amp: torch.dtype | None = None
) -> Callable[[], Tensor]:
    """The release's model with our weights, its optimizer's three groups, and its step, where the batch is.

    `amp` is the dtype of its own autocast, around model and losses alike.
    """
    device = batch.images.device
    from yolox.models import YoloPafpn, YoloxHead, YoloxModule

    depth, width, depthwise = SHAPES[name]
    channels = [256, 512, 1024]
    model = YoloxModule(
        YoloPafpn(depth, width, in_channels=channels, depthwise=depthwise),
        YoloxHead(CLASSES, width, in_channels=channels, depthwise=depthwise),
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
    model.load_state_dict(ours.state_dict())
    model.train().to(device, memory_format=layout)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": others}, {"params": decayed, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=1e-5, momentum=0.9, nesterov=True)
    images = batch.images.float().flip(1)
    rows = torch.cat([batch.targets.labels[..., None].float(), to_center(batch.targets.boxes)], -1)

    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def run() -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = model(images, rows)["total_loss"]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return run


def measure(quick: bool) -> Iterator[Row]:
    use_peers()
    images, size, rounds = (2, 64, 1) if quick else (8, 320, 8)
    batch = batch_of(images, 4 if quick else 10, size)
    for name in ("yolox-nano", "yolox-s")[: 1 if quick else 2]:
        model = detector(name)
        theirs = official_step(model, name, batch, torch.contiguous_format)
        same_layout = official_step(model, name, batch, torch.channels_last)
        ours = training_step(model, batch)
        expected = theirs()
        torch.testing.assert_close(torch.stack(list(ours().values())).sum(), expected, rtol=1e-4, atol=1e-4)
        turns = {"ours": ours, "theirs": theirs, "their model in channels_last": same_layout}
        samples = alternate(turns, rounds, warmup=0 if quick else 1)
        what = f"{name}, {size} px, {images} images × {batch.targets.boxes.shape[1]} boxes"
        for side, goal in (("theirs", 1.3), ("their model in channels_last", None)):
            yield Row(
                f"{'official step' if side == 'theirs' else side} / ours, {what}",
                *ratio(samples[side], samples["ours"]),
                at_least=goal,
                note=f"{samples[side].milliseconds} / {samples['ours'].milliseconds}; same loss within 1e-4",
            )
        peak = convolution_peak()
        flops = step_flops(name, size, images)
        yield Row(
            f"roofline: operations of our step a second / measured convolution peak, {what}",
            Spread.of([flops / wall / peak for wall in samples["ours"].wall]),
            Spread.of([flops / cpu * torch.get_num_threads() / peak for cpu in samples["ours"].cpu]),
            note=f"{flops / 1e9:.0f} G operations (three times the forward pass), peak {peak / 1e9:.0f} G/s on "
            f"{torch.get_num_threads()} threads",
        )


if __name__ == "__main__":
    run_script("train_step", "A YOLOX training step against pixeltable-yolox's", measure)
