"""Decoding of packed prompts: the image and the shared words are computed once, then all questions decode together.

In: a Batch of prompts. Out: token ids of each conversation, equal to decoding each prompt alone (a test holds this).
"""

from collections.abc import Callable, Collection
from itertools import takewhile

import torch
from torch import nn
from transformers import DynamicCache

from smolray.data.batch import Batch
from smolray.data.encode import Encoder
from smolray.model.forward import branch_mask, embed
from smolray.model.load import base_model

LOOK_EVERY = 8  # tokens
# logits (C, vocabulary), number of the new token -> token ids (C,) int64
Choose = Callable[[torch.Tensor, int], torch.Tensor]


def most_likely(logits: torch.Tensor, number: int) -> torch.Tensor:
    """The token with the largest logit: (C, vocabulary) -> (C,) int64."""
    return logits.argmax(-1)


def stop_ids_of(model: nn.Module, encoder: Encoder) -> frozenset[int]:
    """The tokens at which an answer ends: the tokenizer's end, those of generation_config.json, and a trained turn's.

    They may differ: a base model's files can name `<|im_end|>` where the chat template ends a turn with another token.
    """
    generation = getattr(base_model(model), "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    candidates = (encoder.tokenizer.eos_token_id, encoder.end_of_turn, *listed)
    return frozenset(int(token) for token in candidates if token is not None)


def greedy(model: nn.Module, batch: Batch, max_new_tokens: int, stop_ids: Collection[int]) -> list[list[int]]:
    """New token ids of each conversation in the order of `batch.ends`, without the stop token.

    `stop_ids`: an answer ends at the first of these tokens (`stop_ids_of`), at least one.
    """
    return decode(model, batch, max_new_tokens, stop_ids, most_likely)


@torch.no_grad()
def decode(
    model: nn.Module, batch: Batch, max_new_tokens: int, stop_ids: Collection[int], choose: Choose
) -> list[list[int]]:
    """As `greedy`, with tokens that `choose` takes (model/sampling.py).

    Each sequence has a slot for each of its conversations; a step decodes one token in every slot.
    """
    with torch.compiler.set_stance("force_eager"):  # each token would be another length of the cache
        return _decode(model, batch, max_new_tokens, stop_ids, choose)


def _decode(
    model: nn.Module, batch: Batch, max_new_tokens: int, stop_ids: Collection[int], choose: Choose
) -> list[list[int]]:
    text_model, head = base_model(model).model.text_model, base_model(model).lm_head
    device, length = batch.input_ids.device, batch.input_ids.shape[1]
    sequence, position = batch.ends // length, batch.ends % length
    slot = _slots(sequence)
    width = int(slot.max()) + 1
    shape = (len(batch.input_ids), width)

    # A decoded token belongs to the branch of its conversation, also where the whole prompt is prefix (the same
    # question twice). Empty slots are branch -1, which no other token sees.
    branch = torch.full(shape, -1, dtype=torch.int64, device=device)
    branch[sequence, slot] = slot + 1
    next_position = torch.zeros(shape, dtype=torch.int64, device=device)
    next_position[sequence, slot] = batch.position_ids[sequence, position] + 1

    cache, keys = DynamicCache(config=base_model(model).config.text_config), batch.branch
    hidden = text_model(
        inputs_embeds=embed(model, batch),
        position_ids=batch.position_ids,
        attention_mask=branch_mask(batch.branch, keys, 0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    token = choose(head(hidden[sequence, position]), 0)
    done = torch.isin(token, stops)
    tokens = [token]

    while len(tokens) < max_new_tokens and not (looks(len(tokens)) and bool(done.all())):
        step = torch.zeros(shape, dtype=torch.int64, device=device)  # what stands in empty slots is never seen
        step[sequence, slot] = token
        keys = torch.cat([keys, branch], dim=1)
        hidden = text_model(
            input_ids=step,
            position_ids=next_position,
            attention_mask=branch_mask(branch, keys, keys.shape[1] - width),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        token = choose(head(hidden[sequence, slot]), len(tokens))
        done |= torch.isin(token, stops)
        tokens.append(token)
        next_position += 1

    rows = torch.stack(tokens, dim=1).tolist()
    return [list(takewhile(lambda token: token not in stop_ids, row)) for row in rows]


def looks(number: int) -> bool:
    """Whether the host looks if all answers have ended, after so many tokens: at 1, 2, 4 and each multiple of 8.

    Each look waits for the device. A token that is decoded after the end of an answer is left out of it.
    """
    return number % LOOK_EVERY == 0 or number in (1, 2, 4)


def _slots(sequence: torch.Tensor) -> torch.Tensor:
    """Number of each conversation inside its sequence: [0, 0, 1, 0] for sequences [0, 1, 1, 2]."""
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[1:] = sequence[1:] != sequence[:-1]
    index = torch.arange(len(sequence), device=sequence.device)
    return index - torch.cummax(torch.where(starts, index, 0), dim=0).values
