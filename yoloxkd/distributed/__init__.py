"""Several processes: starting, agreeing, reducing."""
