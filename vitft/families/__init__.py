"""Other libraries' Vision Transformers, in their folders and files, as ours."""
