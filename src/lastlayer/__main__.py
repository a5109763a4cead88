"""`python -m lastlayer`: the command line."""

from lastlayer.cli import main

if __name__ == "__main__":
    main()
