"""Random numbers, paths, and the levels of a payoff's distribution."""
