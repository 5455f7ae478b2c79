"""`python -m yoloxkd` is the command line."""

from yoloxkd.cli import main

main()
