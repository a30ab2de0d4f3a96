"""What a device is and how it computes: its memory, a CPU's cores, recorded steps of a GPU."""
