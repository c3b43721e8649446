"""Search for hyperparameters, as a job: `python jobs/tune.py --config tune_vqa search.num_samples=24`.

In: settings with a `search` section. Out: a run for each trial, and the search's folder with trials.jsonl, best.yaml
and report.html. Submitted again under the same name, it resumes.
"""

import sys

from smolray.cli.app import app

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "tune", *sys.argv[1:]]
    app()
