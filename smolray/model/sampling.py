"""Sampling of tokens by temperature and top-p. Each conversation has its own random numbers.

In: logits. Out: token ids. They depend on the seed and the conversation's name, not on the conversations that are
decoded with it.
"""

import hashlib
from collections.abc import Sequence

import torch


def probabilities(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities of the next token: (C, vocabulary) logits -> (C, vocabulary) float64.

    The softmax of logits / temperature, limited to the smallest set of tokens whose sum is at least `top_p`, as in
    transformers.
    """
    shares = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = shares.sort(descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        shares = shares * torch.zeros_like(kept).scatter(-1, index, kept)
    return shares / shares.sum(-1, keepdim=True)


class Sampler:
    """Chooses the tokens of the conversations called `names`, for model.decoding.decode.

    `temperature`: above 0.
    """

    def __init__(self, names: Sequence[str], max_new_tokens: int, temperature: float, top_p: float, seed: int):
        self.temperature, self.top_p = temperature, top_p
        self.draws = torch.stack([_draws(f"{seed}\0{name}", max_new_tokens) for name in names])

    def __call__(self, logits: torch.Tensor, number: int) -> torch.Tensor:
        # In the order of the vocabulary: if it were sorted, rounding that exchanges two nearly equal tokens would move
        # all tokens behind them.
        reached = probabilities(logits, self.temperature, self.top_p).cumsum(-1)
        drawn = self.draws[:, number].to(logits.device) * reached[:, -1]
        return torch.searchsorted(reached, drawn[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _draws(name: str, count: int) -> torch.Tensor:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest)), dtype=torch.float64)
