"""The command `doctor`; what it does is in doctor.py, which imports torch."""

from __future__ import annotations


def doctor() -> None:
    """Print what an issue report needs of this machine: versions, devices, memory, threads, extras, cache folders."""
    from yoloxkd.cli.doctor import doctor_lines

    print("\n".join(doctor_lines()))
