"""Published checkpoints of two-stage detectors and SOLO; a name ends with the first eight hexadecimal digits of the file's SHA-256."""

from __future__ import annotations

TWO_STAGE = {
    "faster-rcnn-r50": (
        "faster_rcnn/faster_rcnn_r50_fpn_2x_coco",
        "faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
    ),
    "faster-rcnn-r101": (
        "faster_rcnn/faster_rcnn_r101_fpn_2x_coco",
        "faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",
    ),
    "cascade-rcnn-r50": (
        "cascade_rcnn/cascade_rcnn_r50_fpn_1x_coco",
        "cascade_rcnn_r50_fpn_1x_coco_20200316-3dc56deb.pth",
    ),
    "mask-rcnn-r50": (
        "mask_rcnn/mask_rcnn_r50_fpn_2x_coco",
        "mask_rcnn_r50_fpn_2x_coco_bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40.pth",
    ),
    "mask-rcnn-r101": (
        "mask_rcnn/mask_rcnn_r101_fpn_2x_coco",
        "mask_rcnn_r101_fpn_2x_coco_bbox_mAP-0.408__segm_mAP-0.366_20200505_071027-14b391c7.pth",
    ),
    "cascade-mask-rcnn-x101-32x4d": (
        "dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco",
        "cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth",
    ),
    "solo-r50": ("solo/solo_r50_fpn_3x_coco", "solo_r50_fpn_3x_coco_20210901_012353-11d224d7.pth"),
}
"""Model -> folder and file behind `NAME@coco` in mmdetection's model zoo; all read RGB with ImageNet's mean, as timm's weights."""
TORCHVISION_TWO_STAGE = {
    ("faster-rcnn-r50", ""): "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    ("faster-rcnn-r50", "-v2"): "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
    ("faster-rcnn-mobilenetv3", ""): "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth",
    ("faster-rcnn-mobilenetv3", "-320"): "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
    ("mask-rcnn-r50", ""): "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    ("mask-rcnn-r50", "-v2"): "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
}
"""(model, version) -> torchvision's file behind MODEL@torchvision, MODEL@torchvision-v2 or MODEL@torchvision-320."""
