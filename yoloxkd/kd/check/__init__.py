"""Measure what distilling as set would do to a student, before it is done."""
