"""Result of a comparison of a file with its model, as values and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from yoloxkd.exporters.matching import Comparison, Tolerance

FP32 = Tolerance(score=1e-3, iou=0.99)
FP16 = Tolerance(score=0.1, iou=0.9, unmatched=0.02, ap=0.002)
"""Rounding of fp16 moves single scores by some hundredths; this finds overflow and mistakes, AP judges the rest."""
INT8 = Tolerance(score=0.3, iou=0.5, unmatched=0.1, ap=0.01, correlation=0.9)
"""int8 moves every score and box; AP judges, and the correlation finds a broken file where there is little AP to lose."""
NOTHING_COMPARED = (
    "nothing was compared: neither the model nor the file detects anything on these images; give --verify DATA on "
    "which the model does, or train it longer"
)
TOLERANCES = {"fp32": FP32, "fp16": FP16, "int8": INT8}


@dataclass(slots=True)
class ParityReport:
    """What the comparison of a file with its model found.

    images       compared
    locations    compared before suppression (the best of each image); 0 for a finished file with NMS, which hides them
    max_location_score_difference, min_location_iou   over them
    location_correlation   of their scores, file against model; None: not seen, or all alike
    found        the detections, see `matching.Comparison`
    model_ap, file_ap   measured for fp16 and int8, where the data set has the model's classes
    float_layers of an int8 file: convolutions kept in float32, besides the predictors
    masks_left_out   the model gives masks, and what it is compared with none
    """

    tolerance: Tolerance
    images: int = 0
    locations: int = 0
    max_location_score_difference: float = 0.0
    min_location_iou: float = 1.0
    location_correlation: float | None = None
    found: Comparison = field(default_factory=Comparison)
    model_ap: float | None = None
    file_ap: float | None = None
    float_layers: list[str] | None = None
    masks_left_out: bool = False

    @property
    def compared(self) -> bool:
        """Whether there was anything to compare: a detection, or a location before suppression."""
        return self.found.detections + self.found.borderline + self.found.unmatched + self.locations > 0

    def faults(self) -> list[str]:
        """What lies outside the tolerance; empty when the file passes."""
        t, f = self.tolerance, self.found
        faults = []
        if not self.images:
            faults.append("no image was compared")
        if f.unmatched > t.unmatched * f.detections:
            faults.append(
                f"{f.unmatched} detections (of {f.detections}) have no counterpart with a score within {t.score} and "
                f"an IoU above {t.iou}; the worst pair differs by {f.max_score_difference:.2g} with an IoU of "
                f"{f.min_iou:.4f}"
            )
        faults += self._location_faults()
        if t.ap is not None and self.model_ap is not None and self.file_ap is not None:
            difference = abs(self.model_ap - self.file_ap)
            if not difference <= t.ap:
                faults.append(f"AP is {self.file_ap:.4f} instead of {self.model_ap:.4f} (allowed difference {t.ap})")
        return faults

    def _location_faults(self) -> list[str]:
        t, c = self.tolerance, self.location_correlation
        faults = []
        if t.correlation is not None:
            if c is not None and not c >= t.correlation:
                faults.append(f"the raw scores correlate with the model's by {c:.3f} (needed {t.correlation})")
            return faults
        if not self.max_location_score_difference <= t.score:
            faults.append(f"a raw score differs by {self.max_location_score_difference:.2g} (allowed {t.score})")
        if not self.min_location_iou > t.iou:
            faults.append(f"a raw box overlaps its counterpart by {self.min_location_iou:.4f} (needed {t.iou})")
        return faults

    def table(self) -> str:
        """A row a measure: what was found, and what the tolerance allows."""
        t, f = self.tolerance, self.found
        single = t.correlation is None
        rows = [
            ("detections of the model", f"{f.detections}", ""),
            ("without a counterpart", f"{f.unmatched}", f"at most {int(t.unmatched * f.detections)}"),
            ("borderline, excused", f"{f.borderline}", ""),
            ("largest score difference", f"{f.max_score_difference:.2g}", f"{t.score:g}"),
            ("smallest IoU", f"{f.min_iou:.5f}", f"above {t.iou:g}"),
        ]
        if f.min_mask_iou is not None:
            rows.append(("smallest IoU of masks", f"{f.min_mask_iou:.5f}", f"above {t.iou:g}"))
        if self.locations:
            allowed = (f"{t.score:g}", f"above {t.iou:g}") if single else ("", "")
            rows += [
                ("largest raw score difference", f"{self.max_location_score_difference:.2g}", allowed[0]),
                ("smallest raw IoU", f"{self.min_location_iou:.5f}", allowed[1]),
            ]
        if t.correlation is not None and self.location_correlation is not None:
            rows.append(
                ("correlation of raw scores", f"{self.location_correlation:.4f}", f"at least {t.correlation:g}")
            )
        if self.model_ap is not None and self.file_ap is not None:
            rows += [
                ("AP of the model", f"{self.model_ap:.4f}", ""),
                ("AP of the file", f"{self.file_ap:.4f}", f"within {t.ap:g}"),
            ]
        if self.float_layers is not None:
            rows.append(("layers kept in float32", f"{len(self.float_layers)}", ""))
        head = f"{f'parity on {self.images} images':32s} {'found':>10s}  allowed"
        lines = [f"{name:32s} {value:>10s}  {allowed}".rstrip() for name, value, allowed in rows]
        remarks = [NOTHING_COMPARED] if self.images and not self.compared else []
        remarks += ["masks were not compared: none was printed"] if self.masks_left_out else []
        return "\n".join([head, *lines, *remarks])
