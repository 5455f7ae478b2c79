"""Distillation methods, one file a paper."""
