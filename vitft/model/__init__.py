"""The Vision Transformer: its config, layers and initialisation, and the file that holds it."""
