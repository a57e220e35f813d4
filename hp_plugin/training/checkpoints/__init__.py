"""How the reference trainer saves, finds and resumes checkpoints."""
