"""`python -m ptbench`: the command line."""

from ptbench.cli import main

if __name__ == "__main__":
    main()
