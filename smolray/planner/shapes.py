"""A model as the planner sees it: its layers in the order of the forward pass, with exact counts of their weights.

In: a transformers config (a dict, as config.json holds it). Out: ModelShape, and from a RunConfig Training: what of the
model is trained.

The layers are those of a pipeline (engine/pipeline/split.py): `vision_embeddings`, `vision.<i>`, `merge` (the tower's
last norm, connector, token embedding), `text.<i>`, `head`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from smolray.config import ConfigError, LoraConfig, RunConfig
from smolray.config.model_folder import check_model_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The defaults of transformers for keys that a published config.json does not have (Idefics3VisionConfig).
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
# Row, column and the fake token, and a share of the line breaks: a third token for three of 13 tiles.
MARKS_OF_SPECIAL_TOKENS = 30 / 13
# bitsandbytes: nf4 in blocks of 64, their absmax in 8 bits in blocks of 256; int8 with one fp32 scale a row.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Linear:
    """One linear layer. `input`: the name of the tensor it reads, which several may share."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    input: str

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class PipelineLayer:
    """The smallest piece of the model that a pipeline stage can hold.

    `kind`: vision_embeddings, vision, merge, text or head.
    """

    name: str
    kind: str
    linears: tuple[tuple[str, Linear], ...]  # (model group, linear layer)
    other: tuple[tuple[str, int], ...]  # (model group, parameters outside of linear layers)

    @property
    def parameters(self) -> int:
        return sum(self.by_group.values())

    @cached_property
    def by_group(self) -> dict[str, int]:
        """Parameters by model group."""
        counts: dict[str, int] = {}
        for group, number in (*((g, linear.parameters) for g, linear in self.linears), *self.other):
            counts[group] = counts.get(group, 0) + number
        return counts


@dataclass(frozen=True)
class Vision:
    """The sizes of a vision tower."""

    hidden: int
    num_layers: int
    heads: int
    intermediate: int
    image_size: int
    patch_size: int
    channels: int

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Text:
    """The sizes of a text model."""

    hidden: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The sizes of an Idefics3 / SmolVLM model.

    `tied`: the head's weights are the token embeddings. `tokens_around_tile`: of the marks that say where a tile
    is in its image (planner/model_files.py). `left_out`: model groups whose output comes with the data; the model is
    loaded without them.
    """

    vision: Vision
    text: Text
    scale_factor: int
    tied: bool
    tokens_around_tile: float = MARKS_OF_SPECIAL_TOKENS
    left_out: frozenset[str] = frozenset()

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile."""
        return self.vision.patches // self.scale_factor**2

    @property
    def tokens_with_marks(self) -> float:
        """Tokens of a tile with the marks around it."""
        return self.tokens_per_tile + self.tokens_around_tile

    @cached_property
    def layers(self) -> tuple[PipelineLayer, ...]:
        return tuple(_layers(self))

    @cached_property
    def merge(self) -> int:
        """The position of the layer that holds the token embeddings."""
        return next(i for i, layer in enumerate(self.layers) if layer.kind == "merge")

    @property
    def last_text_layer(self) -> str:
        """The layer whose MLP runs for label tokens only (model/forward.py) where the head is on the same stage."""
        return f"text.{self.text.num_layers - 1}"

    @cached_property
    def groups(self) -> dict[str, int]:
        """Exact parameter counts of vision, connector, text (layers and last norm), embedding and head.

        A tied head counts 0.
        """
        table = self.text.vocab * self.text.hidden
        by_group = {g: sum(u.by_group.get(g, 0) for u in self.layers) for g in ("vision", "connector", "text")}
        head = 0 if self.tied else table
        inner = by_group["text"] - table - head
        return {
            "vision": by_group["vision"],
            "connector": by_group["connector"],
            "text": inner,
            "embedding": table,
            "head": head,
        }

    @property
    def parameters(self) -> int:
        return sum(self.groups.values())

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: str) -> "ModelShape":
        """From a transformers config.json of the Idefics3 family.

        Args:
            config: the content of config.json.
            path: where it is from, for the message.

        Raises:
            ConfigError: it is of another family, or a size in it is missing or no number.
        """
        check_model_config(path, config)
        text, vision = config["text_config"], {**VISION_DEFAULTS, **config["vision_config"]}
        if missing := [key for key in TEXT_KEYS if text.get(key) is None]:
            raise ConfigError(f"model.path = {path}: config.json: text_config has no {', '.join(missing)}")
        heads = int(text["num_attention_heads"])
        return cls(
            Vision(*(int(vision[k]) for k in VISION_KEYS)),
            Text(
                int(text["hidden_size"]),
                int(text["num_hidden_layers"]),
                heads,
                int(text.get("num_key_value_heads") or heads),
                int(text.get("head_dim") or int(text["hidden_size"]) // heads),
                int(text["intermediate_size"]),
                int(text["vocab_size"]),
                bool(text.get("attention_bias")),
                bool(text.get("mlp_bias")),
            ),
            int(config.get("scale_factor", 2)),
            bool(config.get("tie_word_embeddings", False)),
        )


TEXT_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
VISION_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
)


def left_out(config: RunConfig) -> frozenset[str]:
    """The model groups that a run with precomputed vision features is loaded without.

    The vision tower, and the connector where it is frozen too (model/parts.py, frozen_prefix).
    """
    trained = config.trained_groups
    if "vision" in trained or not _reads_features(config):
        return frozenset()
    return frozenset({"vision"} if "connector" in trained else {"vision", "connector"})


def _reads_features(config: RunConfig) -> bool:
    """Whether the run reads precomputed features.

    `auto` is decided when the data are prepared (precompute/choice.py); before that it is taken as what several passes
    over a local disk lead to.
    """
    if config.model.vision_features == "auto":
        several = config.train.num_train_epochs > 1 and config.train.max_steps < 0
        return several and config.engine.name != "trl" and "://" not in config.storage
    return config.model.vision_features == "precompute"


@dataclass(frozen=True)
class Training:
    """What of a model is trained, and how its weights are stored."""

    full: frozenset[str]  # the model groups that are trained whole
    lora: LoraConfig | None
    dtype: str
    bits: int = 16  # of the text layers' linear weights: 4 and 8 are quantised, 16 means as dtype
    head: bool = True  # whether an untied head is trained with the text; retrieval takes its embeddings before it
    fp32_adapters: bool = True  # as the pipeline keeps them; ZeRO casts them to the compute dtype

    @classmethod
    def of(cls, config: RunConfig, pipeline: bool = False) -> "Training":
        """The training of a run under ZeRO, or in a pipeline."""
        model = config.model
        bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else 16
        whole = {*model.train, *(["connector"] if config.lora and "connector" in config.lora.modules_to_save else [])}
        in_fp32 = pipeline and config.adapters_alone
        return cls(frozenset(whole), config.lora, model.dtype, bits, not config.traits.embeds, in_fp32)

    @property
    def bytes(self) -> int:
        """Bytes of one value in the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained weight, and of its gradient.

        Adapters alone are fp32 in a pipeline. With other groups, and under ZeRO, they have the compute dtype.
        """
        return 4 if self.fp32_adapters and self.lora is not None and not self.full else self.bytes

    def rank(self, group: str, linear: Linear) -> int:
        """LoRA's rank in a linear layer; 0 without an adapter."""
        if self.lora is None or group not in self.lora.groups or not self.lora.adapts(linear.name):
            return 0
        return self.lora.ranks.get(group, self.lora.r)  # type: ignore[call-overload, no-any-return]

    def lora_parameters(self, layer: PipelineLayer) -> int:
        """Parameters of all adapters of a layer."""
        return sum(self.adapter_parameters(group, linear) for group, linear in layer.linears)

    def adapter_parameters(self, group: str, linear: Linear) -> int:
        """Parameters of A (r x in) and B (out x r) of a linear layer; DoRA adds a magnitude per output."""
        rank = self.rank(group, linear)
        dora = rank and self.lora is not None and self.lora.use_dora
        return rank * (linear.inputs + linear.outputs) + (linear.outputs if dora else 0)

    def trained_parameters(self, layer: PipelineLayer) -> int:
        """Trained parameters of a layer, adapters included."""
        trained = self.lora_parameters(layer) + sum(n for group, n in layer.by_group.items() if group in self.full)
        trained += self.whole_parameters(layer)
        if layer.kind == "head" and not self.head and "text" in self.full:
            return trained - sum(linear.parameters for _, linear in layer.linears)
        return trained

    def whole_parameters(self, layer: PipelineLayer) -> int:
        """Parameters of the embeddings or the head of a layer, where lora.modules_to_save names them."""
        if self.lora is None or "text" in self.full:
            return 0
        names, head = self.lora.modules_to_save, [linear for _, linear in layer.linears if linear.name == "lm_head"]
        if layer.kind == "merge" and "embed_tokens" in names:
            return layer.by_group["text"]
        return head[0].parameters if head and "lm_head" in names else 0

    def weight_bytes(self, layer: PipelineLayer) -> float:
        """Bytes of a layer's weights as the forward pass reads them, adapters included."""
        quantised = self.bits < 16 and layer.kind == "text"
        weights = sum(linear.weights for _, linear in layer.linears) if quantised else 0
        plain = (layer.parameters - weights) * self.bytes
        return self.quantised_bytes(layer) + plain + self.lora_parameters(layer) * self.trained_bytes

    def quantised_bytes(self, layer: PipelineLayer) -> float:
        """Bytes of a layer's weights in 4 or 8 bit, their scales included."""
        if self.bits == 16 or layer.kind != "text":
            return 0.0
        weights = sum(linear.weights for _, linear in layer.linears)
        if self.bits == 4:
            return weights * NF4_BYTES
        return weights + sum(4.0 * linear.outputs for _, linear in layer.linears)


def _layers(shape: ModelShape) -> Iterator[PipelineLayer]:
    v, t = shape.vision, shape.text
    tower = "vision" not in shape.left_out
    if tower:
        patch_embedding = v.channels * v.patch_size**2 * v.hidden + v.hidden
        positions = v.patches * v.hidden
        yield PipelineLayer("vision_embeddings", "vision_embeddings", (), (("vision", patch_embedding + positions),))
        vision = tuple(("vision", linear) for linear in _vision_linears(v))
        for i in range(v.num_layers):
            yield PipelineLayer(f"vision.{i}", "vision", vision, (("vision", 4 * v.hidden),))

    proj = Linear("proj", v.hidden * shape.scale_factor**2, t.hidden, False, "shuffled")
    connector = () if "connector" in shape.left_out else (("connector", proj),)
    norm = (("vision", 2 * v.hidden),) if tower else ()
    yield PipelineLayer("merge", "merge", connector, (*norm, ("text", t.vocab * t.hidden)))

    text = tuple(("text", linear) for linear in _text_linears(t))
    for i in range(t.num_layers):
        yield PipelineLayer(f"text.{i}", "text", text, (("text", 2 * t.hidden),))
    head = () if shape.tied else (("text", Linear("lm_head", t.hidden, t.vocab, False, "last_norm")),)
    yield PipelineLayer("head", "head", head, (("text", t.hidden),))


def _vision_linears(v: Vision) -> tuple[Linear, ...]:
    return (
        *(Linear(name, v.hidden, v.hidden, True, "norm1") for name in ("q_proj", "k_proj", "v_proj")),
        Linear("out_proj", v.hidden, v.hidden, True, "attention"),
        Linear("fc1", v.hidden, v.intermediate, True, "norm2"),
        Linear("fc2", v.intermediate, v.hidden, True, "product"),
    )


def _text_linears(t: Text) -> tuple[Linear, ...]:
    queries, keys = t.heads * t.head_dim, t.kv_heads * t.head_dim
    return (
        Linear("q_proj", t.hidden, queries, t.attention_bias, "norm1"),
        Linear("k_proj", t.hidden, keys, t.attention_bias, "norm1"),
        Linear("v_proj", t.hidden, keys, t.attention_bias, "norm1"),
        Linear("o_proj", queries, t.hidden, t.attention_bias, "attention"),
        Linear("gate_proj", t.hidden, t.intermediate, t.mlp_bias, "norm2"),
        Linear("up_proj", t.hidden, t.intermediate, t.mlp_bias, "norm2"),
        Linear("down_proj", t.intermediate, t.hidden, t.mlp_bias, "product"),
    )
