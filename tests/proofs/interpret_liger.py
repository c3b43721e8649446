"""Run a model with Liger's kernels on the CPU, by Triton's interpreter, beside the same model without them.

`python -m tests.proofs.interpret_liger sft|dpo` under TRITON_INTERPRET=1: what the loss is made of. Prints the largest
errors of the last hidden states, of the loss and its metric, and of all gradients, relative to the largest value of
each, as JSON.
"""

import json
import sys

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from torch import nn
from triton.runtime import interpreter

from jobs.gpu.shapes import random_batch, random_model
from smolray.data.batch import Batch
from smolray.model.forward import hidden_states
from smolray.model.liger import FusedHead, FusedMLP, FusedRMSNorm, use_liger
from smolray.objectives.base import Normalisers, token_logps
from smolray.objectives.sft import sft

ROWS, TOKENS, TRAINED = 3, 70, 11


def converted(argument: object) -> object:
    """An argument of a kernel for the interpreter, which leaves floats as they are; Triton makes tensors of them."""
    if not isinstance(argument, float):
        return leave_floats(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)


leave_floats, interpreter._implicit_cvt = interpreter._implicit_cvt, converted
rms_norm.rsqrt = lambda values: 1 / tl.sqrt(values)  # the interpreter has no functions of CUDA's library


def passed(model: nn.Module, batch: Batch, kind: str) -> dict[str, torch.Tensor]:
    """What a forward and backward pass give, by name."""
    model.zero_grad()
    hidden = hidden_states(model, batch, batch.target_positions)
    if kind == "sft":
        loss, metrics = sft(model.lm_head, hidden, batch, Normalisers(ROWS, TRAINED))
        found = {"loss": loss, **metrics}
    else:
        found = {"loss": token_logps(model.lm_head, hidden, batch)}
    # a weight of its own for each token, as preferences have it
    weights = torch.linspace(-1, 2, found["loss"].numel()).view(found["loss"].shape)
    (found["loss"] * weights).sum().backward()

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: each.detach().clone() for name, each in {"hidden": hidden, **found, **gradients}.items()}


def main(kind: str) -> None:
    """Print the errors."""
    torch.manual_seed(0)
    model = random_model("tiny", torch.float32, torch.device("cpu"))
    batch = random_batch(model, ROWS, TOKENS, 1, TRAINED, flat=True)
    wanted = passed(model, batch, kind)
    use_liger(model, layers=True)
    found = passed(model, batch, kind)

    assert wanted.keys() == found.keys()
    errors = {name: float((found[name] - w).abs().max() / w.abs().max().clamp(min=1e-30)) for name, w in wanted.items()}
    replaced = {kind.__name__: sum(type(m) is kind for m in model.modules()) for kind in (FusedRMSNorm, FusedMLP)}
    own = {name: errors.pop(name) for name in ("hidden", "loss", "token_accuracy") if name in errors}
    # a bias that is added to all keys alike changes nothing: its gradient is rounding
    gradients = max(error for name, error in errors.items() if not name.endswith("k_proj.bias"))
    print(json.dumps({**own, "gradients": gradients, **replaced, "head": type(model.lm_head) is FusedHead}))


if __name__ == "__main__":
    main(sys.argv[1])
