"""Studies: the same students with and without each distiller, over several seeds, measured and compared."""
