"""Text from checkpoints of the reference trainer, on any layout, beside the grid's key/value caches."""
