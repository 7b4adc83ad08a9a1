"""``python -m inferq``: the same as ``inferq``."""

from inferq.cli import main

if __name__ == "__main__":
    main()
