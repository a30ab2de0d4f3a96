"""What of a run is published: its model card, and its files without a path of this machine."""
