"""`python -m specdec`: the same function as the `specdec` command."""

import sys

from specdec.errors import needs_cli


def main() -> None:
    """The command line, or one line that says what it lacks."""
    try:
        with needs_cli("the command line"):
            from specdec.cli.app import app
    except ImportError as error:
        sys.exit(f"specdec: {error}")
    app()


if __name__ == "__main__":
    main()
