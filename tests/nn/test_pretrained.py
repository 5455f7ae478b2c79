"""What a backbone starts from: caches, files by name and by order, and a quick clear answer without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.fpn import BACKBONE, narrow
from yoloxkd.errors import UserError
from yoloxkd.nn.backbones import pretrained
from yoloxkd.nn.backbones.timm_backbone import TimmBackbone
from yoloxkd.nn.dense.fcos import FCOS

PUBLISHED = "mobilenetv2_100"


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub and of torch.hub."""
    monkeypatch.setattr(pretrained, "cached_file", lambda name: None)
    return tmp_path


def weights(backbone: TimmBackbone) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in backbone.body.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a if not k.endswith("num_batches_tracked"))


@pytest.mark.usefixtures("no_cache")
def test_offline_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.perf_counter()
    found = TimmBackbone(PUBLISHED).start("imagenet")
    assert time.perf_counter() - started < 5
    assert not found.trained
    assert "UNTRAINED" in found.note
    assert "HF_HUB_OFFLINE" in found.note


@pytest.mark.usefixtures("no_cache")
def test_a_hub_that_does_not_answer_costs_seconds_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    backbone = TimmBackbone(PUBLISHED)
    before = weights(backbone)
    started = time.perf_counter()
    found = backbone.start("imagenet")
    assert time.perf_counter() - started < 5
    assert not found.trained
    assert "does not answer" in found.note
    assert same(before, weights(backbone))


def test_a_name_without_weights_says_so() -> None:
    found = TimmBackbone(BACKBONE).start("imagenet")
    assert not found.trained
    assert "timm has no weights of that name" in found.note


def test_a_cached_file_is_used_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    torch.manual_seed(1)
    full = timm.create_model(PUBLISHED, pretrained=False)
    file = tmp_path / "hub" / "checkpoints" / str(timm.get_pretrained_cfg(PUBLISHED).url).rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(full.state_dict(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert pretrained.cached_file(PUBLISHED) == file
    backbone = TimmBackbone(PUBLISHED)
    state = torch.get_rng_state()
    found = backbone.start("imagenet")
    assert found.trained
    assert torch.equal(torch.get_rng_state(), state)
    own = full.state_dict()
    assert same(weights(backbone), {k: own[k] for k in weights(backbone)})


def wrapped(state: dict[str, Tensor], how: str) -> dict[str, Any]:
    if how == "plain":
        return state
    if how == "wrapped":
        return {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    return {f"layer{i}": v for i, (k, v) in enumerate(state.items())} | {"classifier": torch.zeros(3)}


@pytest.mark.parametrize(("how", "said"), [("plain", "by name"), ("wrapped", "by name"), ("renamed", "by order")])
def test_a_file_is_loaded_by_name_or_by_order(tmp_path: Path, how: str, said: str) -> None:
    torch.manual_seed(1)
    source = {k: v for k, v in weights(TimmBackbone(BACKBONE)).items() if not k.endswith("num_batches_tracked")}
    torch.save(wrapped(source, how), tmp_path / "w.pth")
    backbone = TimmBackbone(BACKBONE)
    found = backbone.start(str(tmp_path / "w.pth"))
    assert found.trained
    assert said in found.note
    assert same(source, weights(backbone))


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save(TimmBackbone("resnet18").body.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not fit the backbone"):
        TimmBackbone(BACKBONE).start(str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match="does not exist"):
        TimmBackbone(BACKBONE).start(str(tmp_path / "none.pth"))


def test_a_detector_whose_backbone_starts_untrained_freezes_nothing(tmp_path: Path) -> None:
    model = narrow(FCOS, frozen_stages=1, norm_eval=True)
    note = model.pretrain()
    assert note is not None
    assert "nothing of it is frozen" in note
    assert (model.cfg.frozen_stages, model.cfg.norm_eval) == (0, False)
    assert all(p.requires_grad for p in model.parameters())
    torch.save(weights(model.backbone), tmp_path / "w.pth")
    other = narrow(FCOS, frozen_stages=1, norm_eval=True, backbone_weights=str(tmp_path / "w.pth"))
    note = other.pretrain()
    assert note is not None
    assert "by name" in note
    assert (other.cfg.frozen_stages, other.cfg.norm_eval) == (1, True)
    assert not all(p.requires_grad for p in other.parameters())
    assert same(weights(model.backbone), weights(other.backbone))
