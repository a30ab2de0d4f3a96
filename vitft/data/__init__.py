"""What `--data` says in, batches of images out."""
