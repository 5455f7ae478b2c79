"""Fake quantization: what is rounded, on which grids, and what training does with the ranges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.exporters.tiny import TinyDetector
from yoloxkd.errors import UserError
from yoloxkd.nn.complexity import complexity
from yoloxkd.nn.conv_followers import readers_of
from yoloxkd.nn.deform import SelfOffsetConv
from yoloxkd.nn.fake_quantization import (
    ActivationQuantizer,
    activation_quantizers,
    fake_quantize,
    observe,
    quantized_layers,
    settle,
)


@pytest.fixture
def images() -> Tensor:
    g = torch.Generator().manual_seed(3)
    return nn.functional.interpolate(torch.rand(4, 3, 9, 9, generator=g), 64, mode="bilinear") * 255


@pytest.fixture
def plain() -> TinyDetector:
    return TinyDetector(["red", "blue"]).eval()


def quantized(detector: TinyDetector, images: Tensor, bits: int = 8) -> TinyDetector:
    copied = copy.deepcopy(detector)
    fake_quantize(copied, bits)
    observe(copied, iter(images.split(2)))
    return copied


def test_every_convolution_is_rounded_and_the_weights_keep_their_names(plain: TinyDetector, images: Tensor) -> None:
    model = quantized(plain, images)
    layers = quantized_layers(model)
    assert list(layers) == ["stem.0", "down.0", "head"]
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < model.state_dict().keys()
    assert {key.rpartition(".")[2] for key in added} == {"scale", "lowest"}
    weight, _ = layers["stem.0"].rounded()
    steps = weight.detach() / layers["stem.0"].scale_of(*layers["stem.0"].folded())[:, None, None, None]
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().amax((1, 2, 3)).round().tolist() == [127.0] * 16
    for layer in layers.values():
        scale, zero = layer.output.codes()
        codes = layer.output(torch.linspace(-50, 50, 999)) / scale + zero
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert (codes.round().min(), codes.round().max()) == (0, 255)
    expected, out = plain(images).cls_logits, model(images).cls_logits
    assert 0 < (out - expected).abs().mean() < 0.1 * expected.std()
    with pytest.raises(UserError, match="quantized already"):
        fake_quantize(model, 8)


def test_without_rounding_the_folded_model_is_the_model(plain: TinyDetector, images: Tensor) -> None:
    model = quantized(plain, images)
    for quantizer in activation_quantizers(model):
        quantizer.rounding = quantizer.observing = False
    torch.testing.assert_close(model(images).cls_logits, plain(images).cls_logits, atol=1e-3, rtol=1e-4)
    model.train()  # the statistics of folded norms stay
    torch.testing.assert_close(model(images).cls_logits, plain(images).cls_logits, atol=1e-3, rtol=1e-4)


def test_seven_bits(plain: TinyDetector, images: Tensor) -> None:
    layer = quantized_layers(quantized(plain, images, bits=7))["down.0"]
    weight, bias = layer.folded()
    assert (weight.abs().amax((1, 2, 3)) / layer.scale_of(weight, bias)).round().tolist() == [63.0] * 16


def test_a_range_ends_where_the_activation_tells_nothing_apart(plain: TinyDetector, images: Tensor) -> None:
    plain.down[2] = nn.ReLU6()
    model = quantized(plain, images)
    limits = {name: tuple(layer.output.limits.tolist()) for name, layer in quantized_layers(model).items()}
    assert limits == {"stem.0": (-6.0, torch.inf), "down.0": (0.0, 6.0), "head": (-torch.inf, torch.inf)}
    output = quantized_layers(model)["down.0"].output
    assert float(output.lowest) == 0
    assert float(output.scale) * 255 <= 6 + 1e-5


def test_an_output_that_others_read_too_keeps_its_range(plain: TinyDetector, images: Tensor) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(x) + x

    plain.down[2] = Both()
    model = quantized(plain, images)
    layer = quantized_layers(model)["down.0"]
    assert readers_of(model, {layer.output: "down"})["down"] == {"silu", "add"}
    assert layer.output.limits.tolist() == [-torch.inf, torch.inf]


def test_gradients_go_straight_through_and_not_beyond_the_range(plain: TinyDetector, images: Tensor) -> None:
    model = quantized(plain, images).train()
    out = model(images)
    (out.cls_logits.square().sum() + out.box_raw.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    quantizer = ActivationQuantizer().eval()  # 0 to 255 in steps of 1
    x = torch.tensor([-3.0, 7.3, 300.0], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 7.0, 255.0]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_ranges_move_by_a_part_of_what_is_seen_and_always_hold_zero() -> None:
    def same(x: Tensor) -> Tensor:
        return x

    seen, idle = ActivationQuantizer(), ActivationQuantizer()
    seen(torch.tensor([3.0, 40.0]))
    seen(torch.tensor([-10.0, 5.0]))  # another level of the same step
    settle([seen, idle], 0.5, same)
    assert float(seen.lowest) == pytest.approx(-5)  # half way from 0 to -10
    assert float(seen.lowest + 255 * seen.scale) == pytest.approx((255 + 40) / 2)
    assert (float(idle.scale), float(idle.lowest)) == (1, 0)
    settle([seen], 1.0, same)  # nothing seen since
    assert float(seen.lowest) == pytest.approx(-5)
    seen(torch.tensor([3.0, 4.0]))
    settle([seen], 1.0, same)
    assert float(seen.lowest) == 0
    seen.eval()(torch.tensor([99.0]))
    assert torch.isinf(seen.extremes).all()


def test_a_channel_without_weights_keeps_its_bias_within_32_bits(plain: TinyDetector, images: Tensor) -> None:
    with torch.no_grad():
        plain.head.weight[0] = 0
        plain.head.bias[0] = 3.0
    layer = quantized_layers(quantized(plain, images))["head"]
    assert layer.bias is not None
    steps = layer.bias.abs() / (layer.scale_of(layer.weight, layer.bias) * layer.input.codes()[0])
    assert steps.max() <= 2**30 * 1.001


def test_deformable_convolutions_round_their_samples(plain: TinyDetector, images: Tensor) -> None:
    plain.down[0] = SelfOffsetConv(16, 16, 3, 2, bias=False)
    nn.init.normal_(plain.down[0].conv_offset.weight, std=0.1)
    model = quantized(plain, images)
    assert list(quantized_layers(model)) == ["stem.0", "down.0", "down.0.conv_offset", "head"]
    assert plain.state_dict().keys() < model.state_dict().keys()
    expected, out = plain(images).cls_logits, model(images).cls_logits
    assert 0 < (out - expected).abs().mean() < 0.1 * expected.std()


def test_the_cost_is_that_of_the_plain_model(plain: TinyDetector, images: Tensor) -> None:
    before, after = complexity(plain, 64), complexity(quantized(plain, images), 64)
    assert after.parameters == before.parameters
    assert 0.9 * before.flops < after.flops <= before.flops  # folded norms cost nothing
