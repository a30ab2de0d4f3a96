"""What a model is worth: the task, its figures, features and probes."""
