"""From names and recipes to objects: the only place that looks into the tables of detectors and distillers."""
