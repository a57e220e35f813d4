"""Where the grid meets Megatron-Core: the parallel layers, the attention, its config, registration and specs."""
