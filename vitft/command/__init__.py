"""The command line, whose commands are made from dataclasses of options."""
