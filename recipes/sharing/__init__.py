"""What others see of a run: its model card, and its files without a path of this machine."""
