"""Families of dense detectors, one file each."""
