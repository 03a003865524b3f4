"""`python -m llavanext_cli` is `llavanext`, and so is the executable."""

import sys


def main() -> None:
    """Entry point. Ctrl-C is caught from the first import on: imports take most of the first half second."""
    try:
        from llavanext_cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
