"""The training methods: what each one learns from, its own settings, and the combinations that it refuses.

In: a RunConfig. Out: facts that every package asks for, so that no other file compares `config.method` with a name. The
part of a method that needs torch, its loss, is in `smolray/objectives/<method>.py`.

A new method is one such file, its settings and its MethodTraits here, and a field of RunConfig for the settings.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from smolray.config.section import Section

Run = Any  # a RunConfig, whose module imports this one
ReferenceModel = Literal["none", "adapter", "copy", "precompute"]


@dataclass(frozen=True)
class MethodTraits:
    """What the rest of the code must know of a method.

    Attributes:
        summary: one line for the description of the setting `method`.
        pairs: it learns from pairs of a chosen and a rejected answer, otherwise from single answers.
        embeds: it trains embeddings, taken before the language-model head, over all pairs of an optimizer step.
        collate: how its training batches are built, a key of data/collate.py's COLLATE.
        evaluation: how validation data are measured: by decoding answers, or by a search for images.
        headline: the metric by which the best checkpoint is chosen; empty: the first of evaluate.metrics.
        validation_loss: `evaluate.loss` can be measured.
        length_normalised: answers of pairs are compared by the mean log-probability of their tokens, not by its sum.
        tunes_dropout: the default space of a search varies lora.lora_dropout.
        tunable_midway: settings of its own that may change in the middle of a run (search.scheduler = pbt).
        reference_model: which reference model a run has.
        rules: one line for each combination of settings that cannot work.
    """

    summary: str
    pairs: bool = False
    embeds: bool = False
    collate: str = "training"
    evaluation: Literal["answers", "search"] = "answers"
    headline: str = ""
    validation_loss: bool = False
    length_normalised: bool = False
    tunes_dropout: bool = False
    tunable_midway: tuple[str, ...] = ()
    reference_model: Callable[[Run], ReferenceModel] = lambda config: "none"
    rules: Callable[[Run], Iterable[str]] = lambda config: ()


class DPOConfig(Section):
    """Direct preference optimisation. Names and defaults as in trl.DPOConfig."""

    beta: float = Field(default=0.1, gt=0)
    """how strongly the policy is held to the reference model"""
    loss_type: tuple[Literal["sigmoid", "ipo", "hinge", "robust", "sft"], ...] = Field(
        default=("sigmoid",), min_length=1
    )
    """one loss, or several that are summed with loss_weights"""
    loss_weights: tuple[float, ...] | None = None
    """one weight for each loss_type; default: 1 each"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """robust: probability that the two answers of a pair are swapped"""
    reference: Literal["auto", "adapter", "copy", "precompute"] = "auto"
    """source of the reference model's log-probabilities. adapter: the model with LoRA switched off; copy: a frozen
    copy; precompute: written to sidecar files of the shards once; auto: adapter where only adapters are trained that
    start at zero, else copy"""


class SimPOConfig(Section):
    """Simple preference optimisation, without a reference model. Names and defaults as in TRL's CPOConfig."""

    beta: float = Field(default=0.1, gt=0)
    """scale of the rewards, which are mean log-probabilities of a token; the paper uses 2 to 10"""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """margin by which the reward of the chosen answer should exceed that of the rejected one"""


class RetrievalConfig(Section):
    """Contrastive training on images and captions, for image search by text."""

    temperature: float = Field(default=0.05, gt=0)
    """divides the cosine similarities; a smaller value gives the hardest negatives more weight"""


def _pair_rules(config: Run) -> Iterator[str]:
    if config.data.overlong == "truncate_text":
        yield (
            f"data.overlong = truncate_text with method = {config.method}: a pair cut short compares other texts; "
            "allowed: drop, error; nearest: drop"
        )


def _dpo_rules(config: Run) -> Iterator[str]:
    yield from _pair_rules(config)
    dpo, lora = config.dpo, config.lora
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(dpo.loss_type):
        yield (
            f"dpo.loss_weights has {len(dpo.loss_weights)} weights, dpo.loss_type {len(dpo.loss_type)} losses: "
            "expected one for each"
        )
    if lora is not None and lora.lora_dropout:
        yield (
            f"lora.lora_dropout = {lora.lora_dropout:g} with method = dpo: noise would disturb the comparison with the "
            "reference model (TRL switches it off); nearest: lora.lora_dropout=0"
        )
    if config.train.neftune_noise_alpha:
        yield (
            f"train.neftune_noise_alpha = {config.train.neftune_noise_alpha:g} with method = dpo: noise would disturb "
            "the comparison with the reference model; nearest: train.neftune_noise_alpha=null"
        )
    yield from _dpo_reference_rules(config)


def _dpo_reference(config: Run) -> ReferenceModel:
    if config.dpo.reference != "auto":
        return config.dpo.reference  # type: ignore[no-any-return]
    return "adapter" if _adapters_alone(config) else "copy"


def _adapters_alone(config: Run) -> bool:
    """With the adapters switched off the model is the one that training began with."""
    return bool(config.adapters_alone and config.lora.starts_at_zero)


def _dpo_reference_rules(config: Run) -> Iterator[str]:
    asked, engine = config.dpo.reference, config.engine
    if asked == "adapter" and not _adapters_alone(config):
        yield (
            "dpo.reference = adapter needs lora, model.train = [], no lora.modules_to_save and adapters that start at "
            "zero: without the adapters the model must be the one that training began with; "
            "nearest: dpo.reference=copy"
        )
    if config.lora is not None and config.lora.init_lora_weights == "loftq":
        yield (
            "lora.init_lora_weights = loftq with method = dpo: training begins with other answers than those of the "
            "quantised weights, which are the reference; nearest: lora.init_lora_weights=default"
        )
    if config.reference_model == "copy" and (config.model.load_in_4bit or config.model.load_in_8bit):
        nearest = "adapter" if _adapters_alone(config) else "precompute"
        yield (
            f"dpo.reference = {asked}, a frozen copy, with quantised weights: they cannot be copied; "
            f"nearest: dpo.reference={nearest}"
        )

    if config.reference_model == "copy" and engine.name == "zero" and config.zero_stage == 3:
        yield (
            f"dpo.reference = {asked}, a frozen copy, with engine.stage = 3: the copy would not be sharded; "
            "nearest: dpo.reference=precompute"
        )
    if engine.name == "pipeline" and asked != "precompute" and (asked == "copy" or not _adapters_alone(config)):
        yield (
            f"dpo.reference = {asked} with engine = pipeline: a frozen copy would need a second pipeline; "
            "allowed: precompute, or adapters alone that start at zero; nearest: dpo.reference=precompute"
        )

    if engine.name == "trl" and asked == "precompute":
        yield "dpo.reference = precompute with engine = trl: TRL cannot do this for images; nearest: dpo.reference=auto"
    if engine.name == "trl" and config.lora is not None and (asked == "copy" or not _adapters_alone(config)):
        yield (
            "method = dpo with lora and engine = trl: TRL's reference model is the model without its adapters; "
            "nearest: dpo.reference=auto with model.train=[], and adapters that start at zero"
        )


def _simpo_rules(config: Run) -> Iterator[str]:
    yield from _pair_rules(config)
    if config.engine.name == "trl":
        yield "method = simpo with engine = trl: TRL's CPOTrainer takes no images; nearest: engine=zero"


def _retrieval_rules(config: Run) -> Iterator[str]:
    if config.engine.name != "zero":
        yield (
            f"method = retrieval with engine = {config.engine.name}: it compares all pairs of a step; "
            "nearest: engine=zero"
        )
    if config.lora is not None and config.lora.adapts("lm_head"):
        targets = config.lora.target_modules
        others = "" if isinstance(targets, str) else ",".join(name for name in targets if name != "lm_head")
        yield (
            "lora.target_modules names lm_head with method = retrieval: embeddings are taken before it, so it would "
            f"learn nothing; allowed: modules of the layers; nearest: lora.target_modules=[{others or 'q_proj,v_proj'}]"
        )
    if config.lora is not None and "lm_head" in config.lora.modules_to_save:
        others = ",".join(name for name in config.lora.modules_to_save if name != "lm_head")
        yield (
            "lora.modules_to_save names lm_head with method = retrieval: embeddings are taken before it, so it would "
            f"learn nothing; nearest: lora.modules_to_save=[{others}]"
        )


METHODS: dict[str, MethodTraits] = {
    "sft": MethodTraits(
        summary="supervised fine-tuning",
        validation_loss=True,
        tunes_dropout=True,
    ),
    "dpo": MethodTraits(
        summary="preference data with `chosen` and `rejected`",
        pairs=True,
        headline="preference",
        tunable_midway=("dpo.beta", "dpo.label_smoothing", "dpo.loss_weights"),
        reference_model=_dpo_reference,
        rules=_dpo_rules,
    ),
    "simpo": MethodTraits(
        summary="the same data, without a reference model and whatever the lengths of the answers",
        pairs=True,
        headline="preference",
        length_normalised=True,
        tunable_midway=("simpo.beta", "simpo.simpo_gamma"),
        rules=_simpo_rules,
    ),
    "retrieval": MethodTraits(
        summary=(
            "contrastive training on images and captions, all pairs of a step against each other, for `smolray search`"
        ),
        embeds=True,
        collate="image_text",
        evaluation="search",
        headline="mean_average_precision",
        rules=_retrieval_rules,
    ),
}

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
