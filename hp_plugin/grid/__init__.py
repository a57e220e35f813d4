"""The m × n grid: who stands where on it, which slices of a weight a rank owns, and the process groups."""
