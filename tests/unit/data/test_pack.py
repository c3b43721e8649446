"""Packed sequences say exactly what their conversations say apart: the same loss, the same gradients, each image
looked at once.
"""

import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from smolray.config import ModelConfig, RunConfig
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_image_text, collate_prompts, collate_training
from smolray.data.encode import Encoded
from smolray.data.fill import packed_length
from smolray.data.index import index_shard
from smolray.data.local import local_index
from smolray.data.pack import common_prefix, pack
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.sample import Conversation
from smolray.data.shards import read_manifest
from smolray.model.attention import Layout
from smolray.model.forward import attention
from smolray.model.load import load_model
from smolray.objectives.contrastive import embeddings
from tests.losses import sft_sum
from tests.offline import asked, encoder_of, message, picture, shard_row
from tests.shards import vqa_rows, write_shards


@pytest.fixture(scope="module")
def model(tiny_path):
    torch.manual_seed(0)
    return load_model(ModelConfig(path=tiny_path, dtype="float32")).train()


@pytest.fixture(scope="module", params=["image", "full"])
def encoder(processor, request):
    return encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing=request.param)


@pytest.fixture(scope="module")
def plain(processor):
    """Each conversation alone, by transformers' own causal attention."""
    return encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing="none")


def row(images, *conversations):
    return shard_row([picture(*size, seed=hash(size) % 1000 + i) for i, size in enumerate(images)], *conversations)


def turns(*texts, images=1):
    """user, assistant, user, …; the images stand before the first question."""
    parts = [(*[None] * images, texts[0]), *((t,) for t in texts[1:])]
    return Conversation(
        "/".join(texts), tuple(message("assistant" if i % 2 else "user", *p) for i, p in enumerate(parts))
    )


SQUARE, WIDE = (64, 64), (120, 60)
BOTH = Conversation(
    "second first", (message("user", None, "and then", None, "what is it?"), message("assistant", "a box"))
)
BETWEEN = Conversation("x", (message("user", None, "and now", None, "?"), message("assistant", "no")))
LATE = Conversation("late", (message("user", "look:", None), message("assistant", "c")))
SURE = turns("what?", "a box", "sure?", "yes")
CASES = {
    "one image": [
        row(
            [SQUARE],
            asked("what shape?", "circle"),
            asked("what colour?", "blue"),
            asked("is there a box?", "yes it is"),
        )
    ],
    "split image": [row([WIDE], asked("what shape?", "circle"), asked("what colour?", "blue"))],
    "text only": [row([], asked("two and two?", "four", 0))],
    "single": [row([SQUARE], asked("what?", "box"))],
    "several images": [row([SQUARE, WIDE, SQUARE], asked("which?", "the first", 3), asked("which two?", "both", 3))],
    "images in the branches": [row([SQUARE, WIDE], asked("what is it?", "a dog", 2), BOTH, BETWEEN)],
    "the same picture twice": [row([SQUARE, SQUARE], asked("the same?", "yes", 2), BOTH)],
    "identical questions": [
        row([SQUARE], asked("what?", "a box"), asked("what?", "a box", name="again"), asked("what?", "a ball"))
    ],
    "a prefix of the other": [row([SQUARE], turns("what?", "a box"), SURE, turns("what?", "a box of wood"))],
    "many turns": [
        row(
            [SQUARE],
            turns("what?", "a box", "what colour?", "red"),
            turns("where?", "here", "why?", "it is so", "and?", "no"),
        )
    ],
    "nothing shared but the beginning": [row([SQUARE], asked("a?", "b"), LATE)],
}
CASES["mixed"] = [
    r
    for name in (
        "one image",
        "text only",
        "several images",
        "single",
        "identical questions",
        "many turns",
        "split image",
    )
    for r in CASES[name]
] + [row([], asked("three?", "3", 0))]


def loss_and_gradients(model, batches):
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = sft_sum(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole(rows, encoder):
    return collate_training([Group(r, tuple(range(len(r.conversations)))) for r in rows], encoder)


def apart(rows, encoder):
    return [collate_training([Group(r, (c,))], encoder) for r in rows for c in range(len(r.conversations))]


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_separate_in_loss_and_gradients(model, encoder, plain, name):
    rows = CASES[name]
    packed, separate = whole(rows, encoder), apart(rows, plain)
    assert packed.label_tokens == sum(b.label_tokens for b in separate) > 0
    loss, gradients = loss_and_gradients(model, [packed])
    want_loss, want = loss_and_gradients(model, separate)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    norm = torch.sqrt(sum((g**2).sum() for g in want.values()))
    none = torch.zeros(())
    for parameter in want.keys() | gradients.keys():  # a text-only batch runs a dummy tile of weight zero
        difference = float((want.get(parameter, none) - gradients.get(parameter, none)).norm() / norm)
        assert difference < 1e-5, parameter


def test_the_loss_is_that_of_transformers_itself(model, encoder):
    """Not only packed = separate by our own forward: the stock forward with labels says the same."""
    for case in ("one image", "several images", "many turns", "text only"):
        for batch in apart(CASES[case], encoder):
            labels = torch.full_like(batch.input_ids, -100)
            labels.view(-1)[batch.target_positions + 1] = batch.target_ids
            pixels = (
                ((batch.pixel_values.float() / 255 - 0.5) / 0.5)[batch.tile_order][None]
                if len(batch.pixel_values)
                else None
            )
            out = model(
                input_ids=batch.input_ids,
                attention_mask=torch.ones_like(batch.input_ids),
                pixel_values=pixels,
                labels=labels,
            )
            assert float(out.loss.detach()) * batch.label_tokens == pytest.approx(
                float(sft_sum(model, batch).detach()), rel=1e-5
            )


def test_a_branch_sees_the_prefix_and_itself_and_no_neighbour(encoder):
    batch, told = whole(CASES["one image"], encoder), attention(whole(CASES["one image"], encoder))
    mask, branch = told["layout"].pieces[0][1] if "layout" in told else told["attention_mask"][0, 0], batch.branch[0]
    for query in range(len(branch)):
        seen = torch.nonzero(mask[query]).flatten()
        assert (seen <= query).all() and query in seen
        assert set(branch[seen].tolist()) <= {0, int(branch[query])}
        assert len(seen) == int(batch.position_ids[0, query]) + 1  # as many as it would see alone


@pytest.mark.parametrize("packing", ["full", "image", "none"])
def test_prompts_on_one_image_are_embedded_as_alone_and_share_tiles(model, processor, packing, tmp_path):
    rows = [
        row([WIDE], *(asked(f"what about {n}?", f"it is {n % 4}") for n in range(8))),
        row([SQUARE], asked("what?", "a box"), LATE),
        row([], asked("two and two?", "four", 0)),
    ]
    told = encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing=packing)
    batch = collate_image_text([Group(r, tuple(range(len(r.conversations)))) for r in rows], told)
    frame = len(told.prompt(asked("", "", 0), ()))  # tokens of a turn around its text
    with torch.no_grad():
        found = embeddings(model, batch)
        single = [collate_image_text([Group(r, (n,))], told) for r in rows for n in range(len(r.conversations))]
        alone = [embeddings(model, one)[torch.tensor(one.meta["pairs"][0][:2])] for one in single]
    for pair, want in zip(batch.meta["pairs"], alone, strict=True):
        torch.testing.assert_close(found[pair[:2]], want, atol=1e-5, rtol=0)
    assert [one.meta["pairs"][0][2:] for one in single] == [pair[2:] for pair in batch.meta["pairs"]]
    many = collate_image_text([Group(rows[0], tuple(range(8)))], told)
    assert len(many.tile_order) == len(told.tiler.tiles(rows[0].images[0])) == len(many.pixel_values)
    folder = write_shards(str(tmp_path), rows[:1])
    index = index_shard(folder, read_manifest(folder).files[0].name, 0, told)
    planned = int(build_epoch(index, PlanLimits(8, None, 8), 0, 0).tokens[0])
    assert many.meta["tokens"] <= planned + 4 * frame, "four texts in turns of their own"


def test_groups_that_lie_end_to_end_leave_no_padding(processor):
    batch = whole(CASES["mixed"], encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing="full"))
    assert batch.input_ids.shape == (1, int(batch.lengths.sum())) and (batch.branch >= 0).all()


def test_the_block_mask_of_flex_attention_is_that_of_the_pieces(processor):
    """FlexAttention itself is compiled on a GPU; its mask is the same function everywhere."""
    batch = whole(CASES["mixed"], encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing="full"))
    padded = replace(batch, branch=torch.nn.functional.pad(batch.branch, (0, 5), value=-1))
    layout = attention(padded)["layout"]
    length = len(layout.branch)
    want = torch.block_diag(
        *[torch.ones(n, n).tril() if mask is None else mask.float() for n, mask in layout.pieces]
    ).bool()
    places = torch.arange(length)
    got = layout.block_mask.mask_mod(0, 0, places[:, None], places[None, :])
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_every_picture_goes_through_the_vision_tower_once(encoder, name):
    rows = CASES[name]
    distinct = {image for r in rows for image in r.images}
    batch = whole(rows, encoder)
    assert len(batch.pixel_values) == sum(len(encoder.tiler.tiles(image)) for image in distinct)
    placed = int((batch.input_ids == encoder.image_token_id).sum())
    assert len(batch.tile_order) * encoder.processor.image_seq_len == placed


def test_a_picture_in_two_rows_of_a_micro_batch_is_looked_at_once(encoder, model):
    shared = picture(*WIDE, seed=1)
    rows = [
        shard_row([shared], asked("a?", "b")),
        shard_row([picture(64, 64), shared], asked("c?", "d", 2)),
        shard_row([shared], asked("e?", "f")),
    ]
    batch = whole(rows, encoder)
    assert len(batch.pixel_values) == len(encoder.tiler.tiles(shared)) + 1
    assert float(sft_sum(model, batch).detach()) == pytest.approx(
        sum(float(sft_sum(model, b).detach()) for b in apart(rows, encoder)), rel=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_a_batch_survives_its_bytes(encoder, name):
    batch = whole(CASES[name], encoder)
    again = Batch.from_bytes(batch.to_bytes())
    for f in fields(Batch):
        want, got = getattr(batch, f.name), getattr(again, f.name)
        assert want == got if f.name == "meta" else (torch.equal(want, got) and want.dtype == got.dtype), f.name
    assert all(
        torch.equal(getattr(again, f.name), getattr(again.clone(), f.name)) for f in fields(Batch) if f.name != "meta"
    )
    # memory that lies in another order than the values
    turned = replace(batch, pixel_values=batch.pixel_values.transpose(2, 3))
    assert torch.equal(Batch.from_bytes(turned.to_bytes()).pixel_values, turned.pixel_values)
    prompts = collate_prompts([Group(r, tuple(range(len(r.conversations)))) for r in CASES[name]], encoder)
    assert Batch.from_bytes(prompts.to_bytes()).meta == prompts.meta
    assert len(prompts.ends) == len(prompts.meta["records"]) and prompts.label_tokens == 0


@pytest.mark.parametrize("seed", range(30))
def test_packing_keeps_every_token_its_context_and_its_targets(seed):
    """Unrolled again, each branch is the conversation that went in: tokens, positions, targets."""
    rng = random.Random(seed)
    start = [rng.randrange(5) for _ in range(rng.randrange(6))]
    encoded = []
    for _ in range(rng.randint(1, 5)):
        ids = start[: rng.randint(0, len(start))] + [rng.randrange(3) for _ in range(rng.randint(1, 6))]
        trained = np.array([i >= rng.randint(0, len(ids) - 1) for i in range(len(ids))])
        encoded.append(Encoded(np.array(ids, np.int32), trained))
    packed, prefix = pack(encoded), common_prefix(encoded)
    assert len(packed.input_ids) == packed_length([len(e.input_ids) for e in encoded], prefix)
    pairs = iter(zip(packed.target_positions.tolist(), packed.target_ids.tolist(), strict=True))
    for number, one in enumerate(encoded, start=1):
        mine = (
            np.flatnonzero((packed.branch == 0) | (packed.branch == number))
            if len(encoded) > 1
            else np.arange(len(packed.input_ids))
        )
        assert packed.input_ids[mine].tolist() == one.input_ids.tolist()
        assert packed.position_ids[mine].tolist() == list(range(len(one.input_ids)))
        assert packed.ends[number - 1] == mine[-1]
        for token in np.flatnonzero(one.trained[1:]) + 1:
            assert next(pairs) == (mine[token - 1], one.input_ids[token])
    assert next(pairs, None) is None


def test_nothing_is_packed_where_packing_is_none(tmp_path, tiny_path):
    folder = write_shards(str(tmp_path), vqa_rows("train", 4))
    for packing, most in (("none", 1), ("image", 9)):
        config = RunConfig(
            model={"path": tiny_path}, data={"packing": packing}, train={"per_device_train_batch_size": 9}
        )
        plan = build_epoch(local_index(folder, config), PlanLimits.of(config), 0, 0)
        sizes = np.diff(plan.group_start)
        assert sizes.max() == most and sizes.sum() == plan.samples == sum(
            len(r.conversations) for r in vqa_rows("train", 4)
        )


@pytest.mark.parametrize("lengths", [(5,), (128, 256), (300, 90, 1700, 333), (2048,)])
def test_the_blocks_of_the_mask_are_those_that_flex_attention_would_find(lengths):
    """Partial and full ones, over more queries than are laid out at once, with padding behind the groups."""
    rng = torch.Generator().manual_seed(0)
    branch = torch.cat(
        [
            torch.cat([torch.zeros(n // 3), torch.randint(1, 4, (n - n // 3,), generator=rng).sort().values])
            for n in lengths
        ]
        + [-torch.ones(7)]
    )
    layout = Layout(branch.long(), torch.tensor(lengths))
    found, total = layout.block_mask, len(branch)
    wanted = create_block_mask(found.mask_mod, None, None, total, total, device="cpu")
    assert found.shape == wanted.shape and torch.equal(found.to_dense(), wanted.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for row, number in enumerate(getattr(wanted, counts)[0, 0].tolist()):
            assert torch.equal(
                getattr(found, indices)[0, 0, row, :number], getattr(wanted, indices)[0, 0, row, :number]
            )
