"""What is printed, drawn and held to published figures."""
