"""`python -m llavanext_cli` is `llavanext`, and so is the executable."""

import sys


def main() -> None:
    """Entry point. Ctrl-C is met as early as Python allows: most of the first half second goes into imports."""
    try:
        from llavanext_cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
