"""The exchange `local`: every slice is a head of its own, as in the source experiments; another function."""
