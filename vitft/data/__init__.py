"""`--data` in, images with labels and splits out."""
