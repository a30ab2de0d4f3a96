"""`python -m vitft` is `vitft`."""

from vitft.command.cli import main

main()
