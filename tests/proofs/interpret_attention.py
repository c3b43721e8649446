"""Run the Triton kernels that Inductor writes for the attention of packed groups on the CPU, by Triton's interpreter.

`python -m tests.proofs.interpret_attention 9/3/64` under TRITON_INTERPRET=1: query heads / key heads / size. Prints the
largest errors of the output and of the gradients against SDPA group by group, relative to the largest value, as JSON.
"""

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses import FakeTensorMode

from tests.proofs.pretended import Compiled

GROUPS, PADDING = (150, 90, 60), 7
# what a module of Inductor says of a card, and what it says on the CPU
ON_CPU = {
    r"with torch\.cuda\._DeviceGuard\(0\):": "if True:",
    r"torch\.cuda\.set_device\(0\)": "pass",
    r"get_raw_stream\(0\)": "0",
    r"device='cuda:0'": "device='cpu'",
    r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$": "",
    r"^empty_strided_cuda = .*$": "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu",
}


class Kernel:
    """A kernel of a source that Inductor wrote, as a module of Inductor calls it."""

    def __init__(self, name: str, source: str):
        with noted_kernels() as noted:
            module_of(source)
        (self.function, self.about), self.name = noted[-1], name

    def run(self, *arguments: object, stream: object = None) -> None:
        constants = dict(self.about["triton_meta"].get("constants", {}))
        names = self.function.arg_names
        if "tem_fused" in self.name:
            arguments, grid = arguments[:-3], arguments[-3:]
        else:  # elementwise, or a sum of rows
            constants |= {name: size for name, size in (("XBLOCK", 128), ("R0_BLOCK", 64)) if name in names}
            count = next(number for number in arguments if isinstance(number, int))
            grid = (-(-count // constants.get("XBLOCK", 1)), 1, 1)
        named = dict(zip((name for name in names if name not in constants), arguments, strict=False))
        self.function[grid](**named, **{name: value for name, value in constants.items() if name in names})


@contextmanager
def noted_kernels():
    """What the decorators of Inductor's kernels are given: (function, settings) of each."""
    noted: list[tuple[object, dict]] = []

    def note(*_: object, **settings: object):
        return lambda function: noted.append((function, settings)) or function

    names = ("template", "pointwise", "reduction", "persistent_reduction")
    before = {name: getattr(triton_heuristics, name) for name in names}
    for name in names:
        setattr(triton_heuristics, name, note)
    yield noted
    for name, decorator in before.items():
        setattr(triton_heuristics, name, decorator)


def module_of(source: str) -> ModuleType:
    """The module of a source."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(f"made_{abs(hash(file.name))}", file.name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_cpu(source: str) -> ModuleType:
    """A module that Inductor wrote for a card, for the CPU."""
    for card, cpu in ON_CPU.items():
        source = re.sub(card, cpu, source, flags=re.MULTILINE)
    return module_of(source)


def arguments(module: ModuleType, tensors: list[torch.Tensor]) -> list[torch.Tensor | int]:
    """What a module is called with: the lengths that it was written with, and tensors in its order."""
    left = iter(tensors)
    return [one if isinstance(one, int) else next(left) for one in module.get_args()]


def tensors_of(values: Iterable[object]) -> list[torch.Tensor]:
    """Without lengths, and without the gradients that nobody asked for."""
    return [one for one in values if isinstance(one, torch.Tensor)]


def written(heads: tuple[int, int, int], length: int) -> list[str]:
    """The modules that Inductor writes for the forward pass and the backward pass, in this order."""
    from smolray.model.attention import Layout, flex

    sources: list[str] = []
    load = PyCodeCache.load_by_key_path.__func__

    def noted(cls: type, key: str, path: str, *arguments: object, **named: object) -> ModuleType:
        sources.append(Path(path).read_text())
        return load(cls, key, path, *arguments, **named)

    PyCodeCache.load_by_key_path = classmethod(noted)
    query_heads, key_heads, size = heads
    with FakeTensorMode(allow_non_fake_inputs=True):
        layout = Layout(*(torch.zeros(n, dtype=torch.int64, device="cuda") for n in (length, len(GROUPS))))
        tensors = [
            torch.empty(1, n, length, size, device="cuda", requires_grad=True)
            for n in (query_heads, key_heads, key_heads)
        ]
        flex(*tensors, layout, 0.125).sum().backward()
    return [source for source in sources if "def call(" in source]


def main(heads: tuple[int, int, int]) -> None:
    """Print the errors."""
    Compiled("rtx3090")
    AsyncCompile.triton = lambda self, name, source, device_str="cuda": Kernel(name, source)
    triton_helpers.set_driver_to_gpu = lambda: None
    from smolray.model.attention import Layout, group_by_group

    rng = torch.Generator().manual_seed(0)
    parts = [torch.zeros(n // 3) for n in GROUPS]
    branches = [torch.randint(1, 4, (n - n // 3,), generator=rng).sort().values for n in GROUPS]
    pairs = zip(parts, branches, strict=True)
    branch = torch.cat([*(torch.cat(pair) for pair in pairs), -torch.ones(PADDING)]).long()
    layout, length = Layout(branch, torch.tensor(GROUPS)), len(branch)
    query_heads, key_heads, size = heads
    query, key, value = (
        torch.randn(1, n, length, size, generator=rng, requires_grad=True) for n in (query_heads, key_heads, key_heads)
    )
    gradient = torch.randn(1, query_heads, length, size, generator=rng)
    expected = group_by_group(query, key, value, layout, 0.0, 0.125)
    expected.backward(gradient)

    forward, backward = map(on_cpu, written(heads, length))
    mask = layout.block_mask
    own, prefix = (cell.cell_contents for cell in mask.mask_mod.__closure__)
    inputs = [
        *(tensor.detach() for tensor in (query, key, value)),
        *(mask.kv_indices, mask.kv_num_blocks, own, prefix, mask.full_kv_num_blocks, mask.full_kv_indices),
        *(mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices),
    ]
    out, *_, sums = tensors_of(forward.call(arguments(forward, inputs)))
    found = [out, *tensors_of(backward.call(arguments(backward, [*inputs, out, sums, gradient])))]
    wanted = [expected.detach(), query.grad, key.grad, value.grad]
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    print(json.dumps(dict(zip(("output", "query", "key", "value"), errors, strict=True))))


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1].split("/"))))
