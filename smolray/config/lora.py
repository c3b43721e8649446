"""Settings of the adapters."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from smolray.config.optimizer import ModelGroup
from smolray.config.section import Section

ALL_LINEAR = "all-linear"
# Modules that may be trained whole beside the adapters, and the model group of each.
WHOLE_MODULES: dict[str, ModelGroup] = {"embed_tokens": "text", "lm_head": "text", "connector": "connector"}


class LoraConfig(Section):
    """Adapters. Names as in peft.LoraConfig; `groups` limits `target_modules` to parts of the model."""

    r: int = Field(default=8, ge=1, le=2**16)
    """rank of the adapters"""
    ranks: dict[ModelGroup, Annotated[int, Field(ge=1, le=2**16)]] = Field(default_factory=dict)
    """rank of a part of the model, where it differs from `r`"""
    use_dora: bool = False
    """weight-decomposed LoRA (DoRA)"""
    use_rslora: bool = False
    """rank-stabilised LoRA: scale by lora_alpha / sqrt(r)"""
    lora_alpha: float = Field(default=8, gt=0)
    """the adapters' output is scaled by lora_alpha / r"""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout on the adapters' input"""
    groups: tuple[ModelGroup, ...] = Field(default=("text",), min_length=1)
    """parts of the model that get adapters"""
    target_modules: tuple[str, ...] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "out_proj",
        "fc1",
        "fc2",
        "proj",
    )
    """names of the linear layers that get adapters, inside `groups` only; all-linear, as in PEFT: all but lm_head; a
    text is a regular expression for whole names, as in PEFT: `.*layers\\.[0-7]\\..*proj`"""
    init_lora_weights: (
        Literal["default", "gaussian", "pissa", "olora", "loftq"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[0-9]+$")]
    ) = "default"
    """default: PEFT's (Kaiming uniform); gaussian: normal, scaled by the rank; pissa: the largest singular values of
    the weights, which are taken out of these (a decomposition of every layer at each start: seconds for 256M, minutes
    for 2.2B); pissa_niter_16: the same approximately, and faster; olora: the first columns of a QR
    decomposition, taken out of the weights; loftq: what model.load_in_4bit rounds away, as far as the rank holds it"""
    modules_to_save: tuple[Literal["embed_tokens", "lm_head", "connector"], ...] = ()
    """modules that are trained whole beside the adapters, and exported with them; larger parts: model.train. A head
    that is tied to the embeddings is trained with embed_tokens"""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        """`target_modules=all-linear`, as PEFT writes it, or a regular expression."""
        if not isinstance(value, str) or value == ALL_LINEAR:
            return (ALL_LINEAR,) if value == ALL_LINEAR else value
        if re.fullmatch(r"[\w, -]*", value):
            names = ", ".join(re.findall(r"[\w-]+", value)) or "q_proj, v_proj"
            raise ValueError(f"expected a list of names, {ALL_LINEAR} or a regular expression; nearest: [{names}]")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    def adapts(self, module: str) -> bool:
        """Whether the linear layer of this name (`…self_attn.q_proj`) gets an adapter, where its group does."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        if ALL_LINEAR in self.target_modules and module.rpartition(".")[2] != "lm_head":
            return True
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)

    @property
    def trained(self) -> set[ModelGroup]:
        """The parts of the model in which something is trained."""
        return {*self.groups, *(WHOLE_MODULES[name] for name in self.modules_to_save)}

    @property
    def changes_weights(self) -> bool:
        """Whether the base model that the adapters lie on has other weights than the one that was loaded."""
        return self.init_lora_weights.startswith("pissa") or self.init_lora_weights == "olora"

    @property
    def starts_at_zero(self) -> bool:
        """Whether fresh adapters add nothing: without them the model is the one that training began with."""
        return self.init_lora_weights in ("default", "gaussian")
