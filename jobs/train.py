"""Train one run, as a job: `python jobs/train.py --config vqa_lora optimizer.learning_rate=1e-4`.

In: settings. Out: the run folder with checkpoints, events, result.json and report.html. Submitted again under the same
name, it resumes.
"""

import sys

from smolray.cli.app import app

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "train", *sys.argv[1:]]
    app()
