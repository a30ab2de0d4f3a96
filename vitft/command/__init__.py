"""The command line, and commands made of dataclasses."""
