"""Other libraries' Vision Transformers: their folders and files read as ours, and written back."""
