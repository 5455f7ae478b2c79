"""Dense detectors: one file a family."""
