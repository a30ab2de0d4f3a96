"""The Vision Transformer: config, patches, blocks, their start, and the file that holds them."""
