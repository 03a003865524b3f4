"""`python -m llavanext_cli` is `llavanext`."""

from llavanext_cli.app import main

if __name__ == "__main__":
    main()
