"""Decode the validation questions of a run, as a job: `python jobs/evaluate.py NAME --storage s3://bucket/runs`.

In: the name of a run. Out: accuracy by type, and every prediction as Parquet in the run folder.
"""

import sys

from smolray.cli.app import app

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "evaluate", *sys.argv[1:]]
    app()
