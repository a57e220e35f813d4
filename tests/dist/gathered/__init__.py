"""The exchange `gathered`, which tests add to the package: whole heads of the whole micro-batch, on every rank."""
