"""What a service is started with; the command line and Ray Serve's configuration hold the same.

In: plain values. Out: ServeSettings, with the limits of the engine and of HTTP.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smolray.serve.engine import EngineLimits
from smolray.serve.http import HttpLimits

MIB, GIB = 2**20, 2**30


class ServeSettings(BaseModel):
    """The models of a service, and its limits.

    Attributes:
        models: runs by name, folders or hub ids; requests name them so. `RUN@step-00000500` is a checkpoint of a run,
            else its best, else its newest.
        storage: where the runs are.
        overrides: KEY=VALUE settings for all models.
        backend: what answers: smolray's own engine, or vLLM.
        key_file: the file of the API keys, the same path on every node; empty: no key is needed.
        replicas: at least and at most so many copies of each model, or of the base that runs share, one on a GPU.
        slots: answers that a replica decodes at a time.
        queue: answers that wait for a replica at most.
        kv_gib: memory of a replica for keys and values; None: most of a GPU's free memory, 1 GiB without a GPU.
        request_mib: size of a request.
        images: images of a request.
        seconds: for a request, from its arrival to its end.
        image_hosts: hosts that http(s) images are fetched from.
    """

    model_config = ConfigDict(extra="forbid")

    models: Annotated[list[str], Field(min_length=1)]
    storage: str = "runs"
    overrides: list[str] = []
    backend: Literal["smolray", "vllm"] = "smolray"
    key_file: str = ""
    replicas: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    slots: Annotated[int, Field(ge=1)] = 32
    queue: Annotated[int, Field(ge=0)] = 64
    kv_gib: Annotated[float, Field(gt=0)] | None = None
    request_mib: Annotated[int, Field(ge=1)] = 32
    images: Annotated[int, Field(ge=0)] = 16
    seconds: Annotated[float, Field(gt=0)] = 300.0
    image_hosts: list[str] = []

    @property
    def scaling(self) -> dict[str, Any]:
        """Ray Serve's options: a fixed number of replicas, or as many as keep `slots` requests each."""
        low, high = self.replicas
        if low == high:
            return {"num_replicas": low}
        scaling = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": self.slots}
        return {"autoscaling_config": scaling}

    @property
    def engine(self) -> EngineLimits:
        return EngineLimits(self.slots, self.queue, None if self.kv_gib is None else int(self.kv_gib * GIB))

    @property
    def http(self) -> HttpLimits:
        # what the engines would refuse anyway, and some more for requests that are being read
        open_requests = len(self.models) * self.replicas[1] * (self.slots + self.queue) + 64
        return HttpLimits(self.request_mib * MIB, self.images, self.seconds, open_requests, tuple(self.image_hosts))
