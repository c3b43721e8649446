"""Bytes that autograd keeps for one micro-batch, layer by layer: what transformers' Idefics3 modules save under SDPA.

In: ModelShape, Training, Load. Out: for each layer the bytes with and without checkpointing, and those it needs only
while it runs. tests/unit/planner/test_activations.py compares them with torch.autograd.graph.saved_tensors_hooks.
"""

from dataclasses import dataclass

from smolray.planner.shapes import Linear, ModelShape, PipelineLayer, Training
from smolray.planner.statistics import Load

MLP_INPUTS = ("norm2", "product")  # what the linear layers of an MLP read
FP32, BF16_STATISTICS = 4, 4  # bytes; of LayerNorm's mean and of its deviation (CUDA keeps them in fp32)


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer.

    `saved`: kept until its backward pass. `entry`: its input alone, which checkpointing keeps. `transient`: needed only
    while it runs.
    """

    saved: float
    entry: float
    transient: float


@dataclass(frozen=True)
class Gradients:
    """Which gradients of a layer are computed.

    `weights`: whether its weights are trained. `input`: whether its input needs a gradient, because something before it
    is trained.
    """

    weights: bool
    input: bool

    @property
    def any(self) -> bool:
        return self.weights or self.input


def gradients(shape: ModelShape, training: Training) -> tuple[Gradients, ...]:
    """The gradients of every layer, in order."""
    found, before = [], False
    for layer in shape.layers:
        tied_head = layer.name == "head" and shape.tied and "text" in training.full
        trained = training.trained_parameters(layer) > 0 or tied_head
        found.append(Gradients(trained, before))
        before = before or trained
    return tuple(found)


def kept_bytes(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, load: Load) -> Kept:
    """What autograd keeps of one layer for one micro-batch."""
    if layer.kind == "vision_embeddings":
        return _vision_embeddings(shape, training, gradient, load)
    if layer.kind == "vision":
        return _vision(shape, layer, training, gradient, load)
    if layer.kind == "merge":
        return _merge(shape, layer, training, gradient, load)
    if layer.kind == "text":
        return _text(shape, layer, training, gradient, load)
    return _head(shape, training, gradient, load)


def _vision_embeddings(shape: ModelShape, training: Training, gradient: Gradients, load: Load) -> Kept:
    """The batch's uint8 pixels stay; scaling makes fp32 copies of them."""
    v, size = shape.vision, training.bytes
    pixels = load.tiles * v.channels * v.image_size**2
    saved = pixels * size + 8 * load.tiles * v.patches if gradient.weights else 0.0
    return Kept(saved + pixels, 0.0, pixels * (2 * FP32 + size))


def _vision(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, load: Load) -> Kept:
    v, size = shape.vision, training.bytes
    patches = load.tiles * v.patches
    transient = patches * size * ((1 if gradient.any else 2) * v.intermediate + 2 * v.hidden)
    if not gradient.any:
        return Kept(0.0, 0.0, transient)
    return Kept(patches * _vision_layer(shape, layer, training, gradient), patches * v.hidden * size, transient)


def _text(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, load: Load) -> Kept:
    """The MLP of the last text layer runs for label tokens only."""
    t, size = shape.text, training.bytes
    rows = load.label_tokens if layer.name == shape.last_text_layer else load.tokens
    transient = rows * 2 * t.intermediate * size + load.tokens * 2 * t.hidden * FP32
    if not gradient.any:
        return Kept(0.0, 0.0, transient)
    attention, mlp = _attention(shape, layer, training, gradient, masked=load.mask > 0), _mlp(shape, layer, training)
    saved = load.tokens * attention + rows * mlp + load.mask * size
    return Kept(saved, load.tokens * t.hidden * size, transient)


def adapter_bytes(shape: ModelShape, layer: PipelineLayer, training: Training, load: Load) -> float:
    """The part of `saved` that exists because of LoRA."""
    return sum(
        positions(shape, layer, linear, load) * _adapter_width(linear, training, training.rank(group, linear))
        for group, linear in layer.linears
    )


def positions(shape: ModelShape, layer: PipelineLayer, linear: Linear, load: Load) -> float:
    """The positions of a micro-batch that a linear layer runs on.

    The MLP of the last text layer runs for label tokens only (model/forward.py), as the head does.
    """
    if layer.kind == "vision":
        return load.tiles * shape.vision.patches
    if layer.kind == "merge":
        return load.tiles * shape.tokens_per_tile
    few = layer.kind == "head" or (layer.name == shape.last_text_layer and linear.input in MLP_INPUTS)
    return load.label_tokens if few else load.tokens


def weight_workspace(shape: ModelShape, training: Training) -> float:
    """Bytes of the largest quantised layer, unpacked to compute with."""
    if training.bits == 16:
        return 0.0
    return max(linear.weights for layer in shape.layers if layer.kind == "text" for _, linear in layer.linears) * float(
        training.bytes
    )


def _inputs(layer: PipelineLayer, training: Training, of: tuple[str, ...] = ()) -> tuple[set[str], float]:
    """What the linear layers of a layer save.

    Returns the names of the inputs that are saved, each once although several may read it, and the further bytes of
    each position: LoRA's inner values and dropout. `of`: only the linear layers that read one of these inputs.
    """
    shared, more = set(), 0.0
    for group, linear in layer.linears:
        if of and linear.input not in of:
            continue
        rank = training.rank(group, linear)
        if group in training.full or (rank and not _own_input(training)) or _int8(layer, training):
            shared.add(linear.input)
        more += _adapter_width(linear, training, rank)
    return shared, more


def _own_input(training: Training) -> bool:
    """Whether each adapter keeps an input of its own: PEFT casts it for adapters of another dtype, or drops values."""
    return _dropout(training) or training.trained_bytes != training.bytes


def _dropout(training: Training) -> bool:
    return training.lora is not None and training.lora.lora_dropout > 0


def _adapter_width(linear: Linear, training: Training, rank: int) -> float:
    """Bytes of one position that an adapter of a linear layer saves, besides an input that it shares."""
    if not rank:
        return 0.0
    size = training.trained_bytes
    width = rank * size + (linear.inputs * size if _own_input(training) else 0)
    width += linear.inputs if _dropout(training) else 0  # its mask: one byte a value on CUDA
    # the outputs of the frozen weights and of the adapter, which the magnitude multiplies
    return width + (2 * linear.outputs * size if training.lora is not None and training.lora.use_dora else 0)


def _int8(layer: PipelineLayer, training: Training) -> bool:
    """Whether the layer is in 8 bit: bitsandbytes' MatMul8bitLt always saves its input."""
    return training.bits == 8 and layer.kind == "text"


def _width(layer: PipelineLayer, name: str) -> int:
    return next(linear.inputs for _, linear in layer.linears if linear.input == name)


def _vision_layer(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients) -> float:
    """Bytes of one patch in a vision layer.

    LayerNorms' inputs and statistics, linear inputs, attention's q, k, v, output and log-sum-exp, GELU's input.
    """
    v, size, full = shape.vision, training.bytes, "vision" in training.full
    shared, more = _inputs(layer, training)
    norms = (1 if full or gradient.input else 0) + 1
    values = norms * v.hidden + 4 * v.hidden + v.intermediate
    values += sum(_width(layer, name) for name in shared - {"attention"})  # out_proj's input is attention's output
    return values * size + norms * 2 * BF16_STATISTICS + v.heads * FP32 + more


def _attention(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, masked: bool) -> float:
    """Bytes of one token in the first half of a text layer: its norm, q, k, v, output and log-sum-exp.

    With a mask transformers repeats keys and values for every head.
    """
    t, size = shape.text, training.bytes
    shared, more = _inputs(layer, training, ("norm1", "attention"))
    heads = t.heads * t.head_dim
    keys = heads if masked else t.kv_heads * t.head_dim
    values = 2 * heads + 2 * keys + sum(_width(layer, name) for name in shared - {"attention"})
    return values * size + _norm(shape, training, gradient.input) + t.heads * FP32 + more


def _mlp(shape: ModelShape, layer: PipelineLayer, training: Training) -> float:
    """Bytes of one row in the second half of a text layer: norm, gate, its activation, up, and the linear inputs."""
    shared, more = _inputs(layer, training, MLP_INPUTS)
    values = 3 * shape.text.intermediate + sum(_width(layer, name) for name in shared)
    return values * training.bytes + _norm(shape, training, True) + more


def _norm(shape: ModelShape, training: Training, gradient: bool) -> float:
    """Bytes of one row of an RMSNorm.

    Its input and the root in fp32 where its input needs a `gradient`; the normed values where its weight is trained.
    """
    kept = shape.text.hidden * training.bytes if "text" in training.full else 0.0
    return kept + ((shape.text.hidden + 1) * FP32 if gradient else 0)


def _merge(shape: ModelShape, layer: PipelineLayer, training: Training, gradient: Gradients, load: Load) -> Kept:
    """The last norm of the tower, pixel shuffle and projection, token embeddings.

    Rotary's cos and sin, which exist once for a micro-batch, are counted here.
    """
    v, t, size = shape.vision, shape.text, training.bytes
    patches = load.tiles * v.patches
    # cos and sin; ids, positions and branch as int64 without what they share; the image mask
    saved = 2 * load.tokens * t.head_dim * size + load.tokens * 17
    if "vision" not in shape.left_out and ("vision" in training.full or gradient.input):
        saved += patches * (v.hidden * size + 2 * BF16_STATISTICS)
    shared, more = _inputs(layer, training)
    rows = load.tiles * shape.tokens_per_tile
    saved += rows * (_width(layer, "shuffled") * size if shared else 0) + rows * more
    if "vision" in shape.left_out:  # the features that come with the batch
        saved += rows * size * (t.hidden if "connector" in shape.left_out else v.hidden * shape.scale_factor**2)
    if load.mask:
        saved += load.mask
    transient = 2 * load.tokens * t.hidden * size + patches * v.hidden * size
    return Kept(saved, patches * v.hidden * size if gradient.input else 0.0, transient)


def _head(shape: ModelShape, training: Training, gradient: Gradients, load: Load) -> Kept:
    """The last norm and the logits at label positions, in fp32.

    log-softmax is saved; its input and its gradient are transient.
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
