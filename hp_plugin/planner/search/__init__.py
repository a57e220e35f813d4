"""Layouts tried and ranked, and the flags that launch them."""
