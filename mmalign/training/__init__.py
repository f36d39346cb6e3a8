"""The training loop of both stages and what surrounds it."""
