"""Counts priced on a machine: passes, pipelines, steps and decoding."""
