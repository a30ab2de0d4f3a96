"""What a run measured in, pages for a browser out."""
