"""`python -m argosy`: the command line, where its script is not on the path."""

from argosy.cli import main

main()
