"""The Ray cluster from outside a run: connecting, nodes, jobs, the doctor, KubeRay manifests.

In: an address or an inventory. Out: facts, findings, jobs.
"""
