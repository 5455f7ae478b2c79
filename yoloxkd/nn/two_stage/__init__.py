"""Detectors in two stages: proposals, then heads on regions of interest."""
