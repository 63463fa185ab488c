"""From simulated labels to a trained network: scale, labels, network, optimiser, step, and the pricer."""
