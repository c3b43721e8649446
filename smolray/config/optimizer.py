"""Settings of the optimizer and its schedule."""

from typing import Annotated, Literal

from pydantic import Field

from smolray.config.section import Section

ModelGroup = Literal["vision", "connector", "text"]


class OptimizerConfig(Section):
    """The optimizer, its learning rates and their schedule."""

    name: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw",
        "paged_adamw_8bit",
        "lion",
        "lion_8bit",
        "paged_lion_8bit",
        "adafactor",
        "muon",
    ] = "adamw"
    """all but adamw need engine.stage=0 or the pipeline. 8bit, paged and lion are bitsandbytes'; lion wants about a
    tenth of AdamW's learning rate; adafactor (torch) keeps a mean for each row and column, and its learning rate is
    relative to the size of the weights; muon (torch) turns the gradients of matrices into orthogonal steps, as large as
    AdamW's, and leaves embeddings, head, biases and norms to AdamW"""
    learning_rate: float = Field(default=1e-4, ge=0)
    """highest learning rate of the schedule"""
    learning_rates: dict[ModelGroup, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """learning rate of a part of the model, where it differs from `learning_rate`"""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: the adapters' B matrices learn this many times faster than the rest; its paper suggests 16"""
    weight_decay: float = Field(default=0.0, ge=0)
    """decoupled weight decay; biases and norms are not decayed"""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """decay of the first moment"""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """decay of the second moment"""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """added to the denominator of the update"""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """gradients are clipped to this norm; 0: no clipping"""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """as in transformers.get_scheduler"""
    lr_scheduler_kwargs: dict[str, Annotated[int | float | str, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict
    )
    """arguments for transformers.get_scheduler"""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """fraction of the steps in which the learning rate rises from 0"""
    warmup_steps: int = Field(default=0, ge=0)
    """above 0: replaces warmup_ratio"""
