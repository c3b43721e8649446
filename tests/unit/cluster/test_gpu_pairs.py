"""Two processes add up, or it is told why not within the time limit. The transfers of GPUs are pretended."""

import time

import pytest

from smolray.cluster.gpu_pairs import ADD, PairOutcome, try_pairs

pytestmark = pytest.mark.seconds

HANGS_WITH_P2P = "import os, time; time.sleep(0 if os.environ.get('NCCL_P2P_DISABLE') == '1' else 60)"
SHOWS = "import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] == '1,2' and 'of 1 and 2')"


def test_two_processes_add_up():
    assert try_pairs((0, 1), "gloo", ADD, seconds=500) == [PairOutcome((0, 1))]


def test_a_pair_that_hangs_is_ended_in_time_and_tried_without_peer_to_peer():
    began = time.monotonic()
    assert try_pairs((0, 1, 2), code=HANGS_WITH_P2P, seconds=5) == [PairOutcome((0, 1), "no answer within 5 s", "")]
    assert time.monotonic() - began < 30


def test_each_gpu_is_tried_with_the_next_until_a_pair_fails():
    assert try_pairs((0, 1, 2, 3), code=SHOWS) == [PairOutcome((0, 1)), PairOutcome((1, 2), "of 1 and 2", "of 1 and 2")]
    assert try_pairs((0,), code=SHOWS) == []


@pytest.mark.parametrize(
    ("code", "error"), [("import sys; sys.exit(3)", "exit code 3"), ("1 / 0", "ZeroDivisionError")]
)
def test_the_reason_of_a_failed_pair_is_told(code, error):
    assert error in try_pairs((0, 1), code=code)[0].error
