"""Hugging Face's `config.json` as a model's shape: defaults per model type, what is planned and what is not."""
