"""The exchange `scores`: slices stay where they are, and partial scores are summed inside the attention."""
