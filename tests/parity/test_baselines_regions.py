"""GID and FKD against their releases: selection, pooling, relations, responses; norms and non-local blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.test_baselines_maps import cross_entropy
from tests.parity.test_fgd import close
from tests.parity.vectors import Case, cases
from yoloxkd.kd.functional.attention import channel_attention, spatial_attention
from yoloxkd.kd.functional.divergence import root
from yoloxkd.kd.functional.regions import best_boxes, pooled_regions, region_levels
from yoloxkd.kd.functional.relation import PooledNonLocal, relation_error, relative_distances
from yoloxkd.kd.methods.fkd import FKDBlocks, attended_norm, fkd_attention
from yoloxkd.kd.methods.gid import CANDIDATES, INSTANCES, LEAST_SIDE, OVERLAP, disagreement, matched_anchors

RTOL = 1e-9


class Scene:
    """A case of GID: what both said, and what the package chooses of it."""

    def __init__(self, case: Case) -> None:
        p = case.params
        self.case, self.images = case, p["N"]
        levels = range(len(case.family("feat_S")))
        self.student = [case.tensor(f"feat_S__{i}").requires_grad_() for i in levels]
        self.teacher = [case.tensor(f"feat_T__{i}") for i in levels]
        self.cells = [(float(s), float(s)) for s in p["strides"]]
        adapted = list(self.student)
        self.weight = None
        if p["adapter"]:
            self.weight = case.tensor("adapt_w").requires_grad_()
            adapted = [F.conv2d(x, self.weight, case.tensor("adapt_b"), padding=1) for x in adapted]
        logits = [case.tensor(f"logit_{side}") for side in "ST"]
        boxes = [case.tensor(f"box_{side}") for side in "ST"]
        size = case.tensor("img_shape").double()
        content = torch.cat([torch.zeros_like(size), size.flip(1)], 1)
        self.score, self.boxes = disagreement(*(x.amax(-1).sigmoid() for x in logits), *boxes)
        best = self.score.topk(min(CANDIDATES, self.score.shape[1]))
        chosen = self.boxes.gather(1, best.indices[..., None].expand(-1, -1, 4))
        chosen = torch.minimum(chosen.clamp_min(0), content[:, None, 2:].repeat(1, 1, 2))
        index, self.used = best_boxes(chosen, best.values, INSTANCES, OVERLAP, LEAST_SIDE)
        self.picked = chosen.gather(1, index[..., None].expand(-1, -1, 4))
        self.from_teacher = logits[1].amax(-1).gather(1, best.indices).gather(1, index) > logits[0].amax(-1).gather(
            1, best.indices
        ).gather(1, index)
        self.picked_score = best.values.gather(1, index)
        self.level = region_levels(self.picked, p["strides"])
        ours, theirs = (
            pooled_regions(maps, self.cells, self.picked, self.level, self.used) for maps in (adapted, self.teacher)
        )
        self.ours, self.theirs = ours, theirs
        self.error = (ours - theirs).square().sum((2, 3))
        self.related = relation_error(ours.flatten(2), theirs.flatten(2), self.used)


def per_image(scene: Scene) -> Tensor:
    return scene.error.sum(1) / (scene.used.sum(1) * scene.ours.shape[2]).clamp_min(1)


@pytest.mark.parametrize("case", cases("kd_baselines/gid"))
def test_baselines_gid_chooses_the_instances(case: Case) -> None:
    scene = Scene(case)
    close(scene.score, case.tensor("score"), RTOL)
    used = scene.used
    assert used.sum(1).tolist() == case.params["counts"]
    assert torch.equal(used.nonzero()[:, 0], case.tensor("gi_image").long())
    close(scene.picked[used], case.tensor("gi_box"), RTOL)
    close(scene.picked_score[used], case.tensor("gi_score"), RTOL)
    assert torch.equal(scene.from_teacher[used].long(), case.tensor("gi_from_teacher").long())
    assert torch.equal(scene.level[used], case.tensor("gi_level").long())
    response = matched_anchors(case.tensor("anchors"), scene.picked, scene.used)
    assert torch.equal(response.long(), case.tensor("response").long())


@pytest.mark.parametrize("case", cases("kd_baselines/gid"))
def test_baselines_gid_features_and_relation(case: Case) -> None:
    scene = Scene(case)
    cells = scene.ours.shape[2]
    feature = scene.error.sum() / (scene.used.sum() * cells).clamp_min(1)
    close(feature, case.tensor("feature_released"), RTOL)
    close(per_image(scene), case.tensor("feature_each"), RTOL)
    close(scene.related, case.tensor("relation_each"), RTOL)
    close(scene.related.mean(), case.tensor("relation_mean"), RTOL)
    # the release relates the instances of all images: its batch as one picture
    joined = [x[scene.used].flatten(1)[None] for x in (scene.ours, scene.theirs)]
    there = torch.ones(1, joined[0].shape[1], dtype=torch.bool)
    relation = relation_error(*joined, there)[0]
    close(relation, case.tensor("relation_released"), RTOL)
    for side, x in zip("ST", joined, strict=True):
        close(relative_distances(x, there)[0], case.tensor(f"distance_{side}"), RTOL)
    gradients(feature, scene, "grad_feature")
    gradients(relation, scene, "grad_relation")
    gradients(per_image(scene).mean() + scene.related.mean(), scene, "grad_mean_feat_S")
    if scene.weight is not None:
        grad = torch.autograd.grad(feature + relation, scene.weight)[0]
        close(grad, case.tensor("grad_adapt_w"), RTOL)


def gradients(value: Tensor, scene: Scene, name: str) -> None:
    if not scene.case.has(f"{name}__0"):
        return
    if not value.requires_grad or not float(value.detach()):
        expected = [scene.case.tensor(f"{name}__{i}") for i in range(len(scene.student))]
        assert not any(bool(x.any()) for x in expected)
        return
    found = torch.autograd.grad(value, scene.student, retain_graph=True)
    expected = [scene.case.tensor(f"{name}__{i}") for i in range(len(scene.student))]
    most = max(float(x.abs().max()) for x in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=RTOL * most)


@pytest.mark.parametrize("case", cases("kd_baselines/gid"))
def test_baselines_gid_responses(case: Case) -> None:
    scene = Scene(case)
    used = matched_anchors(case.tensor("anchors"), scene.picked, scene.used)
    logits, delta = case.tensor("logit_S").requires_grad_(), case.tensor("delta_S").requires_grad_()
    rows = cross_entropy(logits.movedim(-1, 1), case.tensor("logit_T").movedim(-1, 1)) * used
    beta = case.params["beta"]
    wrong = F.smooth_l1_loss(delta, case.tensor("delta_T"), reduction="none", beta=beta).sum(-1) * used
    for name, values, leaf, grad in (("cls", rows, logits, "grad_logit_S"), ("reg", wrong, delta, "grad_delta_S")):
        each = values.sum(1) / used.sum(1).clamp_min(1)
        released = values.sum() / used.sum().clamp_min(1)
        close(released, case.tensor(f"{name}_released"), RTOL)
        close(each, case.tensor(f"{name}_each"), RTOL)
        close(each.mean(), case.tensor(f"{name}_mean"), RTOL)
        close(torch.autograd.grad(released, leaf)[0], case.tensor(grad), RTOL)


# FKD


def rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)"""
    return x.flatten(2).transpose(1, 2)


class Blocks:
    """A case of FKD through the package's blocks."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x = {n: case.tensor(n) for n in case.arrays if not n.startswith("grad_")}
        self.student, teacher = self.x["preds_S"].requires_grad_(), self.x["preds_T"]
        p, self.size = case.params, (teacher.shape[2], teacher.shape[3])
        self.blocks = FKDBlocks(p["C"], p["C"], 0, ("feat", "channel", "spatial")).double()
        layers = {"map": "adapt", "channels": "channel", "cells": "spatial"}
        self.load(
            self.blocks.parts,
            {f"{ours}.{long}": f"{theirs}_{long[0]}" for ours, theirs in layers.items() for long in ("weight", "bias")},
        )
        self.nonlocals = {side: PooledNonLocal(p["C"], p["inner"], p["pool"]).double() for side in "st"}
        for side, block in self.nonlocals.items():
            names = {f"{n}.weight": f"nl_{side}_{n}_w" for n in ("theta", "phi", "g", "out")}
            names |= {f"{n}.bias": f"nl_{side}_{n}_b" for n in ("theta", "phi", "g")}
            self.load(block, names | {"scale": f"nl_{side}_bn_w", "shift": f"nl_{side}_bn_b"})
        ours, theirs = rows(self.student), rows(teacher)
        found = self.blocks(ours, theirs, self.size)
        self.relation = self.x["nl_adapt_w"][..., 0, 0].requires_grad_()
        self.read = {
            "S": F.linear(self.nonlocal_of("s", ours), self.relation, self.x["nl_adapt_b"]),
            "T": self.nonlocal_of("t", theirs),
        }
        found["nonlocal"] = self.read["S"] - self.read["T"]
        attention = fkd_attention(ours, theirs, p["temperature"])
        self.terms = {name: self.norms(value) for name, value in found.items() if name != "feat"}
        self.terms["feat"] = self.norms(found["feat"], attention[0])
        self.terms["feat_both"] = self.norms(found["feat"], *attention)

    def load(self, module: nn.Module, names: dict[str, str]) -> None:
        shapes = {k: v.shape for k, v in module.state_dict().items()}
        assert names.keys() == shapes.keys()
        module.load_state_dict({ours: self.x[stored].view(shapes[ours]) for ours, stored in names.items()})

    @staticmethod
    def norms(difference: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of the batch as one picture, as the release has it, and of each image."""
        if not weights:
            squares = difference.square().flatten(1).sum(1)
            return root(squares.sum()), root(squares)
        own = attended_norm(difference, *weights)
        return own.square().sum().sqrt(), own

    def nonlocal_of(self, side: str, x: Tensor) -> Tensor:
        """The release's normalization, over the batch or by running statistics, where it is not that of one image."""
        block, batch = self.nonlocals[side], self.case.params["bn"] == "batch"
        if batch and len(x) == 1:
            return block(x, self.size)
        read = torch.bmm(*block.read(x, self.size)).transpose(1, 2)
        mean, var = (self.x[f"nl_{side}_bn_{n}"].clone() for n in ("mean", "var"))
        return x + F.batch_norm(read, mean, var, block.scale, block.shift, training=batch).transpose(1, 2)


@pytest.mark.parametrize("case", cases("kd_baselines/fkd"))
def test_baselines_fkd(case: Case) -> None:
    run = Blocks(case)
    tau = case.params["temperature"]
    for side in "ST":
        strong = run.x[f"preds_{side}"].abs().flatten(2)
        size = run.x["preds_T"].shape[2:]
        close(spatial_attention(strong.mean(1), tau).unflatten(1, size), case.tensor(f"mask_spatial_{side}"), RTOL)
        close(channel_attention(strong.mean(2), tau), case.tensor(f"mask_channel_{side}"), RTOL)
        close(run.read[side], rows(case.tensor(f"nl_out_{side}")), RTOL)
    for name, (released, each) in run.terms.items():
        close(released, case.tensor(f"{name}_released"), RTOL)
        close(each, case.tensor(f"{name}_each"), RTOL)
    four = ("feat", "channel", "spatial", "nonlocal")
    weights = dict(zip(four, case.params["published"]["two_stage"], strict=True))
    close(torch.stack([run.terms[n][0] * w for n, w in weights.items()]).sum(), case.tensor("total_released"), RTOL)
    close(torch.stack([run.terms[n][1].mean() * w for n, w in weights.items()]).sum(), case.tensor("total_mean"), RTOL)
    student, parts, (s, t) = run.student, run.blocks.parts, (run.nonlocals["s"], run.nonlocals["t"])
    for name in four:
        close(grad(run.terms[name][0], student), case.tensor(f"grad_{name}"), RTOL)
    close(grad(torch.stack([run.terms[n][1].mean() for n in four]).sum(), student), case.tensor("grad_mean"), RTOL)
    trained = {
        "feat": {"grad_adapt_w": parts["map"].weight},
        "channel": {"grad_channel_w": parts["channels"].weight},
        "spatial": {"grad_spatial_w": parts["cells"].weight},
        "nonlocal": {
            "grad_nl_adapt_w": run.relation,
            "grad_nl_s_theta_w": s.theta.weight,
            "grad_nl_t_g_w": t.g.weight,
            "grad_nl_t_bn_w": t.scale,
        },
    }
    for term, leaves in trained.items():
        for name, leaf in leaves.items():
            close(grad(run.terms[term][0], leaf), case.tensor(name).view(leaf.shape), RTOL)


def grad(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]
