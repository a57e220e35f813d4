"""Where the grid meets Megatron-Core's names: registration, layer specs."""
