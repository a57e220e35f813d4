"""Inner attention of the exchanges that stock Megatron-Core attention cannot serve."""
