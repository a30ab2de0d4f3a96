"""Image files: from a file to pixels, held, kept or streamed, and augmented."""
