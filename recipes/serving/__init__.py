"""One base and many adapters over HTTP: pictures in, every adapter's classes out."""
