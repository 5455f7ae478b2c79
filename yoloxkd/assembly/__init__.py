"""Assembly of runs: from names and recipes to objects. Only this room reads the tables of detectors and methods."""
