"""Turn raw data into shards, as a job: `python jobs/prepare.py data.train=/data/vqav2 out=s3://bucket/shards`.

In: settings. Out: a shard folder each for train and validation, and a summary. Started again, it continues.
"""

import sys

from smolray.cli.app import app

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "prepare", *sys.argv[1:]]
    app()
