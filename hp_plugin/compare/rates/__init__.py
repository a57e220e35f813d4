"""Rates of this machine, measured, as the planner reads them."""
