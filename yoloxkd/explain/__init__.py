"""Figures of the FGD and PGD papers for one's own detectors and images: each a function that returns arrays."""

from yoloxkd.explain.attention import AttentionDistance, LevelAttention, attention_distances, attention_maps
from yoloxkd.explain.detections import DetectionScore, most_different, score_detections
from yoloxkd.explain.mask_out import check_percents, mask_out, mask_out_ap
from yoloxkd.explain.quality import over_levels, quality_maps
from yoloxkd.explain.scene import Model, Scene, choose_images, load_scene, see
from yoloxkd.explain.weights import FOREGROUNDS, ForegroundWeights, distiller_maps, foreground_weights

__all__ = [
    "FOREGROUNDS",
    "AttentionDistance",
    "DetectionScore",
    "ForegroundWeights",
    "LevelAttention",
    "Model",
    "Scene",
    "attention_distances",
    "attention_maps",
    "check_percents",
    "choose_images",
    "distiller_maps",
    "foreground_weights",
    "load_scene",
    "mask_out",
    "mask_out_ap",
    "most_different",
    "over_levels",
    "quality_maps",
    "score_detections",
    "see",
]
