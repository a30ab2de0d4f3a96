"""One base and many adapters over HTTP: pictures come in, every adapter's classes go out."""
