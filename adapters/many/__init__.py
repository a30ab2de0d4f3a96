"""Many adapters at once: banks of them, passes that train them together, and their arithmetic."""
