"""What a dim group trades so that attention is exact: one folder per exchange, its rule and its strategy."""
