"""What one step does on one rank, counted: operations, bytes, messages and memory."""
