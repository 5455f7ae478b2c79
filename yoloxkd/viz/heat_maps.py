"""Heat maps over images and detections beside the ground truth, as data: addresses for a page."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from yoloxkd.write_image import encoded

COLORMAP = "viridis"
"""Rises in lightness and reads the same for color-blind people; printed in gray it keeps its order."""
SIDE = 360  # px of the longer side of a panel
_OPACITY = 0.72
_TRUTH, _RIGHT = (0, 114, 178), (230, 159, 0)  # blue and orange of Okabe and Ito (2008)
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
MOST_CAPTIONS = 15
"""Captions of an image, of its best detections: more would hide it."""


def panel_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) px of the panel of an image: as large as a panel is, with the image's aspect."""
    scale = SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fitted(pixels: np.ndarray) -> np.ndarray:
    """An image (h, w, 3) uint8 RGB at its panel's size."""
    height, width = panel_size(*pixels.shape[:2])
    method = cv2.INTER_AREA if pixels.shape[0] > height else cv2.INTER_CUBIC
    resized: np.ndarray = cv2.resize(pixels, (width, height), interpolation=method)
    return resized


def heat_map(pixels: np.ndarray, values: np.ndarray, high: float, boxes: np.ndarray) -> np.ndarray:
    """Values in color over the image in gray, with boxes.

    Args:
        pixels: (h, w, 3) uint8 RGB
        values: (h, w) float, 0 to `high`; beyond it the last color
        high: value of the last color; the first is 0
        boxes: (n, 4) xyxy px, drawn white on black

    Returns:
        (h, w, 3) uint8 RGB
    """
    import matplotlib

    share = np.nan_to_num(values / high if high > 0 else np.zeros_like(values)).clip(0, 1)
    color: np.ndarray = matplotlib.colormaps[COLORMAP](share)[..., :3] * 255
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    canvas: np.ndarray = ((1 - _OPACITY) * gray + _OPACITY * color).round().astype(np.uint8)
    for box in boxes:
        _rectangle(canvas, box, _BLACK, 4)
    for box in boxes:
        _rectangle(canvas, box, _WHITE, 2)
    return canvas


def colormap_stops(count: int = 9) -> list[str]:
    """CSS colors from the first to the last of the scale, as they are over a black image."""
    import matplotlib

    colors = matplotlib.colormaps[COLORMAP](np.linspace(0, 1, count))[:, :3] * 255
    return [f"rgb({r}, {g}, {b})" for r, g, b in colors.round().astype(int).tolist()]


def draw_truth(pixels: np.ndarray, boxes: np.ndarray, names: list[str]) -> np.ndarray:
    """Ground truth in blue, with class names."""
    canvas = pixels.copy()
    for box in boxes:
        _rectangle(canvas, box, _WHITE, 4)
        _rectangle(canvas, box, _TRUTH, 2)
    for box, name in zip(boxes, names, strict=True):
        _caption(canvas, box, name, _TRUTH)
    return canvas


def draw_scored(
    pixels: np.ndarray, boxes: np.ndarray, captions: list[str], right: np.ndarray, missed: np.ndarray
) -> np.ndarray:
    """Detections, best first: right ones in orange, false ones in black dashes; objects (m, 4) without one in blue dots."""
    canvas = pixels.copy()
    for box in missed:
        _dashed(canvas, box, _TRUTH, 2, 3)
    order = np.argsort(right, kind="stable")
    for row in order:
        if right[row]:
            _rectangle(canvas, boxes[row], _WHITE, 4)
            _rectangle(canvas, boxes[row], _RIGHT, 2)
        else:
            _dashed(canvas, boxes[row], _BLACK, 2, 9)
    for row in order[order < MOST_CAPTIONS]:
        _caption(canvas, boxes[row], captions[row], _RIGHT if right[row] else _BLACK)
    return canvas


def data_address(pixels: np.ndarray, quality: int = 82) -> str:
    """(h, w, 3) uint8 RGB as a JPEG in a data: address."""
    content = encoded(pixels, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def _corners(canvas: np.ndarray, box: np.ndarray) -> tuple[int, int, int, int]:
    limit = np.array([canvas.shape[1], canvas.shape[0]] * 2) - 1
    x1, y1, x2, y2 = np.clip(np.rint(box), 0, limit).astype(int).tolist()
    return x1, y1, x2, y2


def _rectangle(canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int], thick: int) -> None:
    x1, y1, x2, y2 = _corners(canvas, box)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), color, thick)


def _dashed(canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int], thick: int, dash: int) -> None:
    """A rectangle of dashes of `dash` px on white."""
    x1, y1, x2, y2 = _corners(canvas, box)
    cv2.rectangle(canvas, (x1, y1), (x2, y2), _WHITE, thick + 1)
    for x in range(x1, x2, 2 * dash):
        for y in (y1, y2):
            cv2.line(canvas, (x, y), (min(x + dash, x2), y), color, thick)
    for y in range(y1, y2, 2 * dash):
        for x in (x1, x2):
            cv2.line(canvas, (x, y), (x, min(y + dash, y2)), color, thick)


def _caption(canvas: np.ndarray, box: np.ndarray, text: str, color: tuple[int, int, int]) -> None:
    """Small text on a tag at the upper left corner of a box, inside the image."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.33
    (w, h), below = cv2.getTextSize(text, font, scale, 1)
    x1, y1, _, _ = _corners(canvas, box)
    x, y = max(0, min(x1, canvas.shape[1] - w - 4)), max(0, min(y1 - h - 3, canvas.shape[0] - h - 5))
    cv2.rectangle(canvas, (x, y), (x + w + 3, y + h + below), color, -1)
    ink = _BLACK if color == _RIGHT else _WHITE
    cv2.putText(canvas, text, (x + 2, y + h + 1), font, scale, ink, 1, cv2.LINE_AA)
