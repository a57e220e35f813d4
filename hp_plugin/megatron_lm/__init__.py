"""Where the grid meets Megatron-LM: flags, hooks into its scripts, the patch, and the releases it was tried on."""
