"""The old name of `hp_plugin.megatron_lm` and `hp_plugin.attention`; goes with release 0.3."""
