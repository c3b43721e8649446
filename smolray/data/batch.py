"""Batch: one micro-batch as tensors, the same for training, evaluation and precomputation."""

import json
import math
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

ALIGNED = 64  # bytes, as Arrow's buffers
LARGE = 2**20  # bytes: tiles and features


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    B sequences of length L, T tiles, N trained tokens, C completions: one a conversation, or two a pair, chosen first.
    """

    input_ids: torch.Tensor  # (B, L) int64
    position_ids: torch.Tensor  # (B, L) int64
    branch: torch.Tensor  # (B, L) int64: 0 prefix or plain sequence, 1.. branches, -1 padding
    # (groups,) int64: B = 1 and so many groups lie end to end; (0,): each group is a row of its own
    lengths: torch.Tensor
    pixel_values: torch.Tensor  # (T, 3, side, side) uint8: each distinct image once
    # (T, tokens, hidden): what the frozen part made of the tiles, in place of them; (0, 0, 0) otherwise
    features: torch.Tensor
    tile_order: torch.Tensor  # (tiles placed,) int64: which tile fills the next image tokens
    target_positions: torch.Tensor  # (N,) int64 into the B x L positions, flattened
    target_ids: torch.Tensor  # (N,) int64
    target_completion: torch.Tensor  # (N,) int64: the completion that each trained token belongs to
    ends: torch.Tensor  # (C,) int64 into the flat positions: the last token of each completion
    # (C,) float32: the reference model's log-probabilities; (0,) where they are not known yet
    reference_logps: torch.Tensor
    # (C, hidden): of a contrastive step, its gradient by each embedding
    embedding_grad: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    # (2,): this batch's contributions to that step's loss and accuracy
    contributions: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    # (image tokens,) int64 into the flat positions, in the order of `tile_order`: where the image features go
    image_positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    # ids, tokens (padding left out), whether a sequence has branches and, for evaluation, questions and answers
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def label_tokens(self) -> int:
        return len(self.target_ids)

    @property
    def samples(self) -> int:
        return len(self.meta.get("ids", ()))

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "meta"}
        # a copy from memory that is not pinned would wait for all work of the GPU
        if torch.device(device).type == "cuda":
            tensors = {name: tensor.pin_memory() if tensor.is_cpu else tensor for name, tensor in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def clone(self) -> "Batch":
        """A copy in its own memory, to keep for a while: `from_bytes` leaves large tensors in Ray's object store."""
        large = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "meta" and getattr(self, f.name).nbytes >= LARGE
        }
        return replace(self, **{name: tensor.clone() for name, tensor in large.items()})

    def to_bytes(self) -> bytes:
        """The tensors' bytes behind their description, written in one copy.

        First the length of a JSON header, then the header, then the tensors, each from a multiple of ALIGNED on.
        """
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "meta"}
        described = {
            name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()
        }
        header = json.dumps({"meta": self.meta, "tensors": described}).encode()
        flat = (
            tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
            for tensor in tensors.values()
        )
        contents = [len(header).to_bytes(8, "little") + header, *flat]
        return b"".join(part for content in contents for part in (content, bytes(-len(content) % ALIGNED)))

    @classmethod
    def from_bytes(cls, data: Any) -> "Batch":
        """From bytes or any buffer.

        Small tensors are copied; a large one stays where it is, and is not to be written to.
        """
        view = memoryview(data)
        end = 8 + int.from_bytes(view[:8], "little")
        header, tensors = json.loads(bytes(view[8:end])), {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            for name, (kind, shape) in header["tensors"].items():
                dtype, end = getattr(torch, kind), end + -end % ALIGNED
                count = math.prod(shape)
                tensor = (
                    torch.frombuffer(view, dtype=dtype, count=count, offset=end).view(shape)
                    if count
                    else torch.zeros(shape, dtype=dtype)
                )
                tensors[name] = tensor.clone() if tensor.nbytes < LARGE else tensor
                end += tensor.nbytes
        return cls(**tensors, meta=header["meta"])
