"""Settings of the adapters."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from smolray.config.optimizer import ModelGroup
from smolray.config.section import Section

ALL_LINEAR = "all-linear"


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
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """default: PEFT's (Kaiming uniform); gaussian: normal, scaled by the rank"""

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
