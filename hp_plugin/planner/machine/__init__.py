"""What a machine can do: products, attention, collectives, and the files that say so."""
