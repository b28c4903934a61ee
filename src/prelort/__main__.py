"""``python -m prelort``: the command line."""

from prelort.cli import main

if __name__ == "__main__":
    main()
