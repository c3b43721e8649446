"""On object storage, which has no locks, one of many starts at once owns a run."""

import subprocess
import sys

from smolray.run.lease import read_owner

TAKE = """
import sys, time
from smolray.run.lease import LeaseError, owning
from smolray.storage import exists
exists(sys.argv[1])  # connected
print("ready", flush=True)
sys.stdin.readline()
try:
    with owning(sys.argv[1], "train") as lease:
        print("won", lease.id, flush=True)
        time.sleep(60)
except LeaseError as error:
    print("refused:", error, flush=True)
"""


def test_of_many_starts_at_once_one_owns_the_run(s3_server):
    run_dir = "s3://bucket/leases/one"
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE, run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        assert {start.stdout.readline() for start in starts} == {"ready\n"}
        for start in starts:
            start.stdin.write("\n")
            start.stdin.flush()
        said = sorted(start.stdout.readline() for start in starts)
        assert [line.split()[0] for line in said] == ["refused:", "refused:", "won"]
        assert read_owner(run_dir).owner.id == said[-1].split()[1]
        assert all("belongs to `smolray train`, process" in line for line in said[:2])
    finally:
        for start in starts:
            start.kill()
            start.wait()
