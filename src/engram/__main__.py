"""Where the program starts: the script `engram`, and ``python -m engram`` for launchers that start modules."""

import sys

__all__ = ["main"]


def main() -> None:
    """The command line. Ctrl-C is one line from the first import on."""
    try:
        from engram.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("engram: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
