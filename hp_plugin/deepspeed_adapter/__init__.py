"""Where the grid meets DeepSpeed's names: the mpu, DeepSpeed-MoE as Megatron's MLP, the JSON option, the engine."""
