"""How markets move, one file each."""
