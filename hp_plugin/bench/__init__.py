"""Measured side-by-side of stock and grid layouts."""
