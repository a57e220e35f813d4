"""What the ranks of a comparison do: start, pass the gate, run, and time themselves."""
