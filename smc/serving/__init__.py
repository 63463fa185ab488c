"""Models of a ledger, served."""
