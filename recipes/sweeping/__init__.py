"""Many runs at once: the combinations of options, members of one pass, plans for a scheduler."""
