"""What several recipes need: options, splits, the folder of a run."""
