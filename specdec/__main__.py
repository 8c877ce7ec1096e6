"""`python -m specdec`: the same function as the `specdec` command."""

from specdec.cli.app import app

if __name__ == "__main__":
    app()
