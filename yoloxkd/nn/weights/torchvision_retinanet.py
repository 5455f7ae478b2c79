"""torchvision's RetinaNet checkpoints: their tensors under the names of our head, neck and backbone.

Three layouts: towers of a convolution each, numbered 0, 2, 4, 6 (as the published `retinanet_resnet50_fpn` has them) or 0.0, 1.0,
2.0, 3.0 (what torchvision makes of these today), and towers with group norm (`_v2`: 0.0 the convolution, 0.1 the norm).
Besides the names: anchors at i (H // rows) px and rounded to whole px, batch norms with eps 0 in the published first version,
P6 from the FPN's P5 there and from the backbone's C5 in `_v2`.
"""

from __future__ import annotations

import re

from yoloxkd.nn.weights.torchvision_weights import TOWERS, neck_key

_PREDICTORS = (
    (r"head\.classification_head\.cls_logits\.(\w+)", r"head.retina_cls.\1"),
    (r"head\.regression_head\.bbox_reg\.(\w+)", r"head.retina_reg.\1"),
)


def our_retinanet_key(key: str) -> str:
    """torchvision's name of a tensor of RetinaNet -> ours; a name without a counterpart comes back as it is."""
    for theirs, ours in _PREDICTORS:
        if re.fullmatch(theirs, key):
            return re.sub(theirs, ours, key)
    tower = re.fullmatch(r"head\.(classification_head|regression_head)\.conv\.(\d+)\.(?:([01])\.)?(\w+)", key)
    if tower is None:
        return neck_key(key)
    block, layer = int(tower[2]), tower[3]
    if layer is None:  # convolution and activation, one after the other
        block, layer = block // 2, "0"
    return f"head.{TOWERS[tower[1]]}.{block}.{('conv', 'gn')[int(layer)]}.{tower[4]}"
