"""``python -m prelort.cli``."""

from prelort.cli import main

if __name__ == "__main__":
    main()
