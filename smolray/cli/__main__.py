"""`python -m smolray.cli`: the same as `python -m smolray`."""

from smolray.cli.app import app

if __name__ == "__main__":
    app(prog_name="smolray")
