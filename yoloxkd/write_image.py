"""Write images under names of any bytes: OpenCV's own writer and reader crash on a name that is no UTF-8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np


def encoded(pixels: np.ndarray, suffix: str, settings: Sequence[int] = ()) -> bytes:
    """(H, W, 3) uint8 RGB as the bytes of an image file; `suffix` says the format, `settings` are OpenCV's.

    OSError: the format cannot hold the image.
    """
    try:
        done, content = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), list(settings))
    except cv2.error as error:
        raise OSError(f"OpenCV cannot write an image of {pixels.shape[1]}x{pixels.shape[0]} px as {suffix}") from error
    if not done:
        raise OSError(f"OpenCV cannot write an image of {pixels.shape[1]}x{pixels.shape[0]} px as {suffix}")
    return content.tobytes()


def write_image(path: Path, pixels: np.ndarray, settings: Sequence[int] = ()) -> None:
    """Write (H, W, 3) uint8 RGB; the suffix says the format, the folder is made. OSError: it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels, path.suffix, settings))
