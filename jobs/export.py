"""Write a trained run as a folder that transformers loads, as a job: `python jobs/export.py NAME --storage
s3://bucket/runs`.

In: the name of a run. Out: `<run>/export` with merged weights, processor and model card.
"""

import sys

from smolray.cli.app import app

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "export", *sys.argv[1:]]
    app()
