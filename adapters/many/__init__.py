"""Many adapters at once: in a bank, trained together in one pass, or combined into one."""
