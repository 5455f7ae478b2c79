"""Studies: students with and without each distiller, over several seeds, compared."""
