"""``python -m engram``: the command line, for launchers that start modules."""

from engram.cli.main import main

if __name__ == "__main__":
    main()
