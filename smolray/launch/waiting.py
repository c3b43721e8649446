"""What a run waits for before its workers start, and who holds it.

In: the resources that the workers need, and Ray's list of placement groups, whose ids end with that of their job. Out:
a line such as `2 x 0.75 CPU; held by run mine`. Every driver writes the name of its run into the cluster's store, so
that others can say it.
"""

from collections.abc import Mapping

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

NAMESPACE = "smolray"
JOB_DIGITS = 8  # of the hexadecimal id of a placement group: its job
SLACK = 1e-6


def announce(name: str) -> None:
    """Tell the cluster whose driver this is, such as `run mine`. The trials of a search are announced by it."""
    _internal_kv_put(_job(), name, overwrite=False, namespace=NAMESPACE)


def waits_for(workers: int, each: Mapping[str, float]) -> str:
    """What the workers of this driver wait for, and who holds it; empty where they have it, or it is free."""
    groups = ray.util.placement_group_table().values()
    held = {group["placement_group_id"][-JOB_DIGITS:] for group in groups if group["state"] == "CREATED"}
    free = ray.available_resources()
    short = [name for name, amount in each.items() if free.get(name, 0.0) + SLACK < workers * amount]
    if _job() in held or not short:
        return ""

    asked = " + ".join(f"{amount:g} {name}" for name, amount in each.items())
    total = ray.cluster_resources()
    if any(total.get(name, 0.0) + SLACK < workers * each[name] for name in short):
        return f"{workers} x {asked}; the nodes for it are not up yet"
    return f"{workers} x {asked}; held by {', '.join(sorted(_name(job) for job in held)) or 'other work'}"


def _job() -> str:
    return str(ray.get_runtime_context().get_job_id())


def _name(job: str) -> str:
    found = _internal_kv_get(job, namespace=NAMESPACE)
    return found.decode() if found else f"other work (Ray job {job})"
