"""Many runs at once: combinations of options, adapters trained together, and plans."""
