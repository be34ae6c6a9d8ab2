"""`python -m remat`: the command line."""

from remat.cli import main

main()
