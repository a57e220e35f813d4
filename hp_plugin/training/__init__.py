"""The reference trainer: Megatron-Core alone, with Megatron's flags, schedules, optimizer, data sets and log line."""
