"""A pretended card: Dynamo, AOTAutograd and Inductor compile for it, Triton and ptxas make its code; nothing runs.

In: the name of a card, before anything is compiled. Out: every Triton kernel that was written, the number of graphs,
and what a kernel takes of the card. It needs the CUDA build of torch and cuda.c in front of it (test_attention.py).
"""

import copy
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch._dynamo
import torch._inductor.async_compile
import torch._inductor.compile_fx
import triton
from torch._dynamo import device_interface
from torch._inductor import compile_fx
from torch._inductor import config as inductor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REAL_COMPILE = torch.compile


@dataclass(frozen=True)
class Card:
    """What compilers ask about a card."""

    capability: tuple[int, int]
    multiprocessors: int
    threads: int  # of a multiprocessor
    shared_bytes: int  # of a block, at most

    @property
    def number(self) -> int:
        return self.capability[0] * 10 + self.capability[1]


CARDS = {
    "t4": Card((7, 5), 40, 1024, 65536),
    "a100": Card((8, 0), 108, 2048, 166912),
    "rtx3090": Card((8, 6), 82, 1536, 101376),
    "rtx4090": Card((8, 9), 128, 1536, 101376),
    "h100": Card((9, 0), 132, 2048, 232448),
}


class Compiled:
    """What has been compiled: (name, source) of each Triton kernel, and the graphs."""

    def __init__(self, name: str):
        self.card, self.kernels, self.graphs = CARDS[name], [], 0
        self._install(name)

    def _install(self, name: str) -> None:
        """Make torch, Inductor and Triton believe in the card."""
        card = self.card
        properties = SimpleNamespace(
            name=name,
            major=card.capability[0],
            minor=card.capability[1],
            multi_processor_count=card.multiprocessors,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=card.threads,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block_optin=card.shared_bytes,
            total_memory=24 * 2**30,
            gcnArchName="",
            L2_cache_size=6 * 2**20,
        )
        told = {
            "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: card.capability,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "is_available": lambda: False,  # nothing may be computed
            "set_device": lambda *_: None,
            "_lazy_init": lambda: None,
            "is_bf16_supported": lambda including_emulation=True: including_emulation or card.capability >= (8, 0),
        }
        for attribute, function in told.items():
            setattr(torch.cuda, attribute, function)

        interface = device_interface.CudaInterface
        for attribute in ("get_device_properties", "current_device", "is_bf16_supported"):
            setattr(interface, attribute, staticmethod(told[attribute]))
        interface.is_available = staticmethod(lambda: True)
        interface.Worker.get_device_properties = staticmethod(told["get_device_properties"])
        interface.synchronize = staticmethod(lambda *_: None)
        interface.get_compute_capability = staticmethod(lambda *_: card.number)
        device_interface.caching_worker_device_properties["cuda"] = [properties]

        for module in ("torch._inductor.utils", "torch._inductor.scheduler", "torch.utils._triton"):
            importlib.import_module(module)
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torch.") and "has_triton" in vars(module):
                module.has_triton = lambda: True
        triton.runtime.driver.set_active(_driver(card))

        inductor.compile_threads = 1
        inductor.fx_graph_cache = inductor.fx_graph_remote_cache = inductor.autotune_local_cache = False
        torch._functorch.config.enable_autograd_cache = False
        torch._inductor.async_compile.AsyncCompile.triton = self._keep
        torch._inductor.async_compile.AsyncCompile.wait = lambda *_: None
        torch.compile = lambda function, **options: REAL_COMPILE(function, backend=self._backend, **options)

    def _keep(self, name: str, source: str, device_str: str = "cuda") -> object:
        self.kernels.append((name, source))
        return SimpleNamespace(run=None)

    def _backend(self, graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=self._inner)

    def _inner(self, graph, inputs, **options):
        """Compile for real; then the graph itself runs, on fake tensors."""
        kept = copy.deepcopy(graph)
        compile_fx.compile_fx_inner(graph, inputs, **options)
        self.graphs += 1

        def run(arguments):
            return kept(*arguments)

        run._boxed_call = True
        return run

    def taken(self, name: str, source: str) -> dict[str, int]:
        """Shared bytes, stack bytes (registers spilt) and tensor-core instructions of a kernel, each at its most."""
        found = [self._taken(tuner, config) for tuner in [_module(name, source)] for config in tuner.configs]
        return {key: max(one[key] for one in found) for key in found[0]}

    def _taken(self, tuner, config) -> dict[str, int]:
        constants = dict(tuner.triton_meta["constants"]) | config.kwargs
        names = tuner.fn.arg_names
        signature = {
            n: "constexpr" if n in constants else tuner.triton_meta["signature"].get(n, "constexpr") for n in names
        }
        source = ASTSource(
            tuner.fn,
            signature,
            {(names.index(n),): value for n, value in constants.items()},
            dict(tuner.triton_meta["configs"][0]),
        )
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", self.card.number, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = _told("cuobjdump", "--dump-resource-usage", file.name)
            code = _told("nvdisasm", "-c", file.name)
        stack = re.search(r"STACK:(\d+)", usage)
        return {
            "shared_bytes": made.metadata.shared,
            "stack_bytes": int(stack.group(1)) if stack else -1,
            "tensor_core_instructions": len(re.findall(r"\b(?:HMMA|HGMMA)\b", code)),
        }


def _driver(card: Card) -> CudaDriver:
    class Pretended(CudaDriver):
        def __init__(self):
            told = {"max_shared_mem": card.shared_bytes, "multiprocessor_count": card.multiprocessors}
            self.utils = SimpleNamespace(get_device_properties=lambda device: told)

        def get_current_target(self):
            return GPUTarget("cuda", card.number, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    return Pretended()


def _module(name: str, source: str):
    """The kernel of a source that Inductor wrote."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _told(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True).stdout
