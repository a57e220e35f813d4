"""The exchange `weights`: the dim axis gathers weights, and the tokens of a micro-batch are spread over it."""
