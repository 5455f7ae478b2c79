"""The part of report.html that is about distillation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from yoloxkd.kd.saved_state import TeacherRecord
from yoloxkd.types import TASK
from yoloxkd.viz.charts import line_chart
from yoloxkd.viz.html_report import Card, Chart, LossHistory, ReportPart, Section

_PLAN = ("pairing plan", "student", "teacher", "brought together")


def distillation_report(methods: Iterable[str], teachers: Sequence[TeacherRecord], history: LossHistory) -> ReportPart:
    """Each teacher with its pairing plan, where the loss comes from, and every term by level."""
    cards = [_card(number, teacher) for number, teacher in enumerate(teachers, start=1)]
    title = f"distilled by {' + '.join(name.upper() for name in methods)}"
    return ReportPart(title, sections=[Section("Distillation", cards, _charts(history))])


def _card(number: int, teacher: TeacherRecord) -> Card:
    facts = [
        ("weights", teacher.source),
        ("sha256", teacher.digest),
        ("loaded", f"{teacher.share:.1%} of its parameters"),
        ("weight", f"{teacher.weight:g}"),
        ("AP in the classes it knows", "not measured" if teacher.ap is None else f"{teacher.ap:.4f}"),
    ]
    return Card(f"Teacher {number}", facts, _PLAN, teacher.table)


def _charts(history: LossHistory) -> list[Chart]:
    """Where the loss comes from, then one chart a term with a curve a level."""
    sources: dict[str, list[float]] = {}
    terms: dict[str, dict[str, list[float]]] = {}
    for name, values in history.losses.items():
        source = name.source
        filled = [0.0 if math.isnan(v) else v for v in values]
        sources[source] = [a + b for a, b in zip(sources.get(source, [0.0] * len(values)), filled, strict=True)]
        if source != TASK:
            level = "all levels" if name.level is None else f"stride {name.level}"
            terms.setdefault(f"{source}: {name.term.replace('_', ' ')}", {})[level] = values
    size = (3.9, 2.3)
    charts = [Chart("Where the loss comes from", line_chart(history.epochs, sources, size=size))]
    return charts + [Chart(title, line_chart(history.epochs, curves, size=size)) for title, curves in terms.items()]
