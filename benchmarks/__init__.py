"""What we claim, measured: every figure in the documentation comes from a script here."""
