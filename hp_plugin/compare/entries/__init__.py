"""What is compared: models, layouts and suites of them."""
