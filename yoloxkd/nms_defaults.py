"""What NMS keeps where nobody says otherwise."""

CONF, IOU, MAX_DET = 0.01, 0.65, 300
"""Least score, IoU threshold (both YOLOX's), and most detections an image."""
PREDICT_CONF = 0.25
"""Least score of detections that a person looks at: those of `predict`."""
