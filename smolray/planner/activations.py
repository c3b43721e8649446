"""Bytes that autograd keeps of a layer for one micro-batch, by layer, from what transformers' Idefics3 layers save under
SDPA.

In: a ModelShape, Training and a Load. Out: bytes per layer, with and without checkpointing, and what a layer needs only
while it runs. tests/unit/test_planner_activations.py compares them with torch.autograd.graph.saved_tensors_hooks.
"""

from dataclasses import dataclass

from smolray.planner.shapes import Linear, ModelShape, PipelineLayer, Training
from smolray.planner.statistics import Load

FP32, BF16_STATISTICS = 4, 4  # bytes of LayerNorm's mean and of its deviation: fp32 on CUDA


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer.

    `saved`: until its backward pass; `entry`: its input alone, which checkpointing keeps; `transient`: while it runs.
    """

    saved: float
    entry: float
    transient: float


@dataclass(frozen=True)
class Gradients:
    """Whether a layer's weights are trained, and whether its input wants a gradient because something before it is
    trained.
    """

    weights: bool
    input: bool

    @property
    def any(self) -> bool:
        return self.weights or self.input


def gradients(shape: ModelShape, training: Training) -> tuple[Gradients, ...]:
    """For every layer in order."""
    found, before = [], False
    for layer in shape.layers:
        trained = training.trained_parameters(layer) > 0 or (
            layer.name == "head" and shape.tied and "text" in training.full
        )
        found.append(Gradients(trained, before))
        before = before or trained
    return tuple(found)


def kept_bytes(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, load: Load) -> Kept:
    """Of one layer for one micro-batch."""
    v, size = shape.vision, training.bytes
    patches = load.tiles * v.patches
    if layer.kind == "vision_embeddings":
        pixels = load.tiles * v.channels * v.image_size**2
        saved = pixels * size + 8 * patches if gradient.weights else 0.0
        # the batch's own uint8 pixels stay; scaling makes fp32 copies
        return Kept(saved + pixels, 0.0, pixels * (2 * FP32 + size))
    if layer.kind == "vision":
        saved = patches * _vision_layer(shape, layer, training, gradient) if gradient.any else 0.0
        transient = patches * size * ((1 if gradient.any else 2) * v.intermediate + 2 * v.hidden)
        return Kept(saved, patches * v.hidden * size if gradient.any else 0.0, transient)
    if layer.kind == "text":
        t = shape.text
        rows = load.label_tokens if layer.name == shape.last_text_layer else load.tokens
        attention, mlp = (
            _attention(shape, layer, training, gradient, masked=load.mask > 0),
            _mlp(shape, layer, training),
        )
        saved = load.tokens * attention + rows * mlp + load.mask * size if gradient.any else 0.0
        transient = rows * 2 * t.intermediate * size + load.tokens * 2 * t.hidden * FP32
        return Kept(saved, load.tokens * t.hidden * size if gradient.any else 0.0, transient)
    if layer.kind == "merge":
        return _merge(shape, layer, training, gradient, load)
    return _head(shape, training, gradient, load)


def adapter_bytes(shape: ModelShape, layer: PipelineLayer, training: Training, load: Load) -> float:
    """What of `saved` is there for LoRA alone."""
    positions = {
        "vision": load.tiles * shape.vision.patches,
        "text": load.tokens,
        "merge": load.tiles * shape.tokens_per_tile,
    }
    return positions.get(layer.kind, load.label_tokens) * _inputs(layer, training)[1]


def weight_workspace(shape: ModelShape, training: Training) -> float:
    """Bytes of the largest quantised layer, unpacked to compute with."""
    if training.bits == 16:
        return 0.0
    return max(linear.weights for layer in shape.layers if layer.kind == "text" for _, linear in layer.linears) * float(
        training.bytes
    )


def _inputs(layer: PipelineLayer, training: Training, of: tuple[str, ...] = ()) -> tuple[set[str], float]:
    """The shared inputs that a layer's linear layers (that read one `of` these) save, and further bytes a position:
    LoRA's inner values and dropout.
    """
    size, shared, more = training.trained_bytes, set(), 0.0
    dropout = training.lora is not None and training.lora.lora_dropout > 0
    own = dropout or size != training.bytes  # PEFT casts the input for each adapter of another dtype
    dora = training.lora is not None and training.lora.use_dora
    for group, linear in layer.linears:
        if of and linear.input not in of:
            continue
        rank = training.rank(group, linear)
        if group in training.full or (rank and not own) or _int8(layer, training):
            shared.add(linear.input)
        if rank:
            more += rank * size
            more += linear.inputs * size if own else 0
            more += linear.inputs if dropout else 0  # its mask, in bytes on CUDA
            # the frozen and the adapter's output, which the magnitude multiplies
            more += 2 * linear.outputs * size if dora else 0
    return shared, more


def _int8(layer: PipelineLayer, training: Training) -> bool:
    """bitsandbytes' MatMul8bitLt keeps its input wherever anything before it is trained."""
    return training.bits == 8 and layer.kind == "text"


def _width(layer: PipelineLayer, name: str) -> int:
    return next(linear.inputs for _, linear in layer.linears if linear.input == name)


def _vision_layer(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients) -> float:
    """Bytes a patch: LayerNorms' inputs and statistics, linear inputs, attention's q, k, v, output and log-sum-exp,
    GELU's input.
    """
    v, size, full = shape.vision, training.bytes, "vision" in training.full
    shared, more = _inputs(layer, training)
    norms = (1 if full or gradient.input else 0) + 1
    values = norms * v.hidden + 4 * v.hidden + v.intermediate
    values += sum(_width(layer, name) for name in shared - {"attention"})  # out_proj's input is attention's output
    return values * size + norms * 2 * BF16_STATISTICS + v.heads * FP32 + more


def _attention(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, masked: bool) -> float:
    """Bytes a token of a text layer's first half: its norm, q, k, v, output and log-sum-exp.

    A mask makes transformers repeat keys and values for every head.
    """
    t, size = shape.text, training.bytes
    shared, more = _inputs(layer, training, ("norm1", "attention"))
    heads = t.heads * t.head_dim
    keys = heads if masked else t.kv_heads * t.head_dim
    values = 2 * heads + 2 * keys + sum(_width(layer, name) for name in shared - {"attention"})
    return values * size + _norm(shape, training, gradient.input) + t.heads * FP32 + more


def _mlp(shape: ModelShape, layer: PipelineLayer, training: Training) -> float:
    """Bytes a row of a text layer's second half: its norm, gate, its activation, up, and what the linear layers read."""
    shared, more = _inputs(layer, training, ("norm2", "product"))
    values = 3 * shape.text.intermediate + sum(_width(layer, name) for name in shared)
    return values * training.bytes + _norm(shape, training, True) + more


def _norm(shape: ModelShape, training: Training, gradient: bool) -> float:
    """Bytes a row of an RMSNorm: its input and the root in fp32 for the `gradient` by it, and the normed values where
    its weight is trained.
    """
    kept = shape.text.hidden * training.bytes if "text" in training.full else 0.0
    return kept + ((shape.text.hidden + 1) * FP32 if gradient else 0)


def _merge(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, load: Load) -> Kept:
    """Post-norm of the tower, pixel shuffle and projection, token embeddings; and, once a micro-batch, rotary's cos and
    sin.
    """
    v, t, size = shape.vision, shape.text, training.bytes
    patches = load.tiles * v.patches
    # ids, positions and branch as int64 less what is shared; the image mask
    saved = 2 * load.tokens * t.head_dim * size + load.tokens * 17
    if "vision" not in shape.left_out and ("vision" in training.full or gradient.input):
        saved += patches * (v.hidden * size + 2 * BF16_STATISTICS)
    shared, more = _inputs(layer, training)
    rows = load.tiles * shape.tokens_per_tile
    saved += rows * (_width(layer, "shuffled") * size if shared else 0) + rows * more
    if "vision" in shape.left_out:  # the features that came with the batch
        saved += rows * size * (t.hidden if "connector" in shape.left_out else v.hidden * shape.scale_factor**2)
    if load.mask:
        saved += load.mask
    transient = 2 * load.tokens * t.hidden * size + patches * v.hidden * size
    return Kept(saved, patches * v.hidden * size if gradient.input else 0.0, transient)


def _head(shape: ModelShape, training: Training, gradient: Gradients, load: Load) -> Kept:
    """The last norm and the logits at label positions, these in fp32: log-softmax is kept, its input and gradient pass
    by.
    """
    t, size = shape.text, training.bytes
    if not gradient.any:
        return Kept(0.0, 0.0, load.label_tokens * t.vocab * (size + 2 * FP32))
    trained = "text" in training.full or any(training.rank(g, linear) for g, linear in _head_linears(shape))
    saved = load.label_tokens * (
        _norm(shape, training, True) + t.vocab * FP32 + (t.hidden * size if trained else 0) + 16
    )
    return Kept(saved, 0.0, load.label_tokens * t.vocab * (FP32 + size))


def _head_linears(shape: ModelShape) -> tuple[tuple[str, Linear], ...]:
    return shape.layers[-1].linears
