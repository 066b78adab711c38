"""`python -m fedeat`, for where the command is not on the path."""

from fedeat.cli import main

main()
