"""Detectors in two stages: Faster R-CNN and what is built on it."""
