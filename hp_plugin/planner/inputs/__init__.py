"""What is planned: the model, the layout and the workload."""
