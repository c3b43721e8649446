"""`python -m smolray`: the command line."""

from smolray.cli.app import app

if __name__ == "__main__":
    app(prog_name="smolray")
