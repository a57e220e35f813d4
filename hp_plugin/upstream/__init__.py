"""Where releases of Megatron-Core differ: one module per seam, tried by feature, each saying when it can go."""
