"""Steps of true shapes on a card that computes nothing (cuda.c, null_step.py): their memory as torch's allocator counts
it, where the host waits, and how many kernels are launched (`make cuda-proofs`).
"""

import json

import pytest

from tests.proofs.cuda_torch import NEEDED, run

pytestmark = NEEDED
# case of jobs/gpu/shapes.py -> launches at most: of the passes over four micro-batches, of the optimizer's step
CASES = {"256m stage 0": (19_000, 550), "256m stage 2": (20_500, 7_500), "2.2b lora": (26_500, 400)}
SEEN_AT_THE_END = "synchronize of the card, smolray/engine/zero.py: torch.cuda.synchronize(self.device)"


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_the_planned_bytes_and_no_wait_in_a_micro_batch(runtime, case):
    found = json.loads(run(runtime, "-m", "tests.proofs.null_step", case, DS_ACCELERATOR="cuda").splitlines()[-1])
    passes, update = found["launches_forward_backward"], found["launches_update"]
    print(
        f"{case}: {found['allocated'] / 2**20:,.0f} MiB allocated, {found['planned'] / 2**20:,.0f} planned; "
        f"{passes:,} launches forward and backward, {update:,} in the optimizer's step"
    )

    assert found["planned"] == pytest.approx(found["allocated"], rel=0.1)
    assert found["waits"] == {SEEN_AT_THE_END: 1}, "once for all micro-batches: the seconds that they took"
    assert passes <= CASES[case][0] and update <= CASES[case][1]
