"""Whether two GPUs of one machine can talk to each other, and whether without peer-to-peer transfers.

In: the numbers of the GPUs. Out: a PairOutcome. Each attempt is two processes with a time limit: where peer-to-peer is
broken, as on some RTX 4090 machines, NCCL waits for ever.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SECONDS = 120.0  # for two processes to import torch, meet and add 16 MiB
WITHOUT_P2P = {"NCCL_P2P_DISABLE": "1"}
# arguments: rank, port, backend
ADD = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
where = f"tcp://127.0.0.1:{port}"
dist.init_process_group(backend, init_method=where, rank=rank, world_size=2, timeout=timedelta(hours=1))
values = torch.full((4 * 2**20,), rank + 1.0, device=device)
dist.all_reduce(values)
wrong = int((values != 3).sum())
sys.exit(f"{wrong} of {values.numel()} sums are wrong" if wrong else 0)
"""


@dataclass(frozen=True)
class PairOutcome:
    """What became of an all-reduce between two GPUs. `error` is empty where it worked.

    `without_p2p`: the error of a second attempt without peer-to-peer, where the first had one.
    """

    gpus: tuple[int, int]
    error: str = ""
    without_p2p: str | None = None


def try_pairs(
    gpus: Sequence[int], backend: str = "nccl", code: str = ADD, seconds: float = SECONDS
) -> list[PairOutcome]:
    """Each of these GPUs with the next one, until a pair fails: the fault is mostly of the machine."""
    found = []
    for pair in pairwise(gpus):
        found.append(try_pair(pair, backend, code, seconds))
        if found[-1].error:
            break
    return found


def try_pair(gpus: tuple[int, int], backend: str, code: str, seconds: float) -> PairOutcome:
    """Add up over a pair, and where that fails once more without peer-to-peer."""
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    error = _attempt(code, backend, visible, seconds)
    return PairOutcome(gpus, error, _attempt(code, backend, visible | WITHOUT_P2P, seconds) if error else None)


def _attempt(code: str, backend: str, settings: dict[str, str], seconds: float) -> str:
    """Why two processes did not add up; empty: they did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [[sys.executable, "-c", code, str(rank), str(port), backend] for rank in range(2)]
    environment = os.environ | settings
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]

    errors = []
    try:
        for rank in ranks:
            said = rank.communicate(timeout=seconds)[1].strip().splitlines()
            errors += [said[-1] if said else f"exit code {rank.returncode}"] if rank.returncode else []
    except subprocess.TimeoutExpired:
        errors.append(f"no answer within {seconds:g} s")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return errors[0] if errors else ""
