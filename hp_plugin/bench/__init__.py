"""Stand-alone measurements: one attention layer, one checkpoint."""
