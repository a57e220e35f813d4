"""Stock and grid layouts measured side by side, held to one loss."""
