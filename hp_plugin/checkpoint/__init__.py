"""Checkpoints that any grid and stock read alike: pieces of the stock tensors, and what is refused."""
