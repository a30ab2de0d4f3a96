"""`python -m vitft` is `vitft`."""

from vitft.cli import main

main()
