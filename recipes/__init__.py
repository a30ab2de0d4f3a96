"""One dataclass of options, one function and one command for each thing that `vitft` does."""
