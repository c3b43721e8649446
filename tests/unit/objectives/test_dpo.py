"""DPO on packed pairs says exactly what it says on each answer alone, by transformers' own forward pass and the papers'
formulas.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from smolray.config import ConfigError, DPOConfig, ModelConfig, RunConfig, load_config
from smolray.data.collate import Group, collate_prompts, collate_training, question_record
from smolray.data.processor import load_processor
from smolray.data.sample import Conversation
from smolray.data.tiles import image_size
from smolray.model.adapters import prepare_for_training
from smolray.model.forward import target_states
from smolray.model.load import base_model, load_model
from smolray.objectives.base import PREFERENCE_METRICS, Normalisers
from smolray.objectives.dpo import dpo
from smolray.objectives.reference import reference_of
from smolray.objectives.registry import objective_of
from tests.offline import encoder_of, message, picture, shard_row

pytestmark = pytest.mark.seconds

SQUARE, WIDE = (64, 64), (120, 60)
LOSSES = {
    "sigmoid": DPOConfig(),
    "ipo": DPOConfig(loss_type=("ipo",), beta=0.3),
    "hinge": DPOConfig(loss_type=("hinge",)),
    "robust": DPOConfig(loss_type=("robust",), label_smoothing=0.2),
    "mixed": DPOConfig(loss_type=("sigmoid", "sft", "ipo"), loss_weights=(0.5, 0.3, 0.2)),
}


def pair(question, chosen, rejected, images=1):
    return Conversation(
        question + chosen + rejected,
        (message("user", *[None] * images, question),),
        (message("assistant", chosen),),
        (message("assistant", rejected),),
    )


def row(images, *pairs):
    return shard_row([picture(*size, seed=i) for i, size in enumerate(images)], *pairs)


SHAPE, COLOUR = pair("what shape?", "a circle", "a red triangle I think"), pair("what colour?", "blue", "black")
TURNS = Conversation(
    "turns",
    (message("user", None, "what?"), message("assistant", "a box"), message("user", "sure?")),
    (message("assistant", "yes it is"),),
    (message("assistant", "no"),),
)
CASES = {
    "one pair": [row([SQUARE], SHAPE)],
    "several pairs an image": [row([SQUARE], SHAPE, COLOUR, pair("is it grey?", "no", "yes it is grey"))],
    "split image": [row([WIDE], SHAPE, COLOUR)],
    "several images": [
        row([SQUARE, WIDE, SQUARE], pair("which?", "the first", "the second of them", 3), pair("both?", "no", "yes", 3))
    ],
    "text only": [row([], pair("two and two?", "four", "five or so", 0)), row([], pair("three?", "3", "4", 0))],
    "answers within the prompt": [row([SQUARE], TURNS, COLOUR)],
    "one the beginning of the other": [row([SQUARE], pair("what?", "a box", "a box of wood"))],
}
CASES["mixed"] = [
    r for name in ("several pairs an image", "text only", "several images", "split image") for r in CASES[name]
]


@pytest.fixture(scope="module")
def models(tiny_path):
    return in_training(tiny_path)


def in_training(path):
    """(the model in training, its reference): apart by noise, as after some steps."""
    reference = load_model(ModelConfig(path=path, dtype="float32")).train()
    model = copy.deepcopy(reference)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0.0)
    return model, reference


@pytest.fixture(scope="module", params=["none", "image", "full"])
def encoder(processor, request):
    return encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing=request.param)


def whole(rows, encoder):
    return collate_training([Group(r, tuple(range(len(r.conversations)))) for r in rows], encoder)


def batches_of(rows, encoder):
    """As the run would have them: packing none makes a group of each pair."""
    if encoder.packing != "none":
        return [whole(rows, encoder)]
    return [collate_training([Group(r, (c,)) for r in rows for c in range(len(r.conversations))], encoder)]


def answers_alone(model, rows, encoder):
    """[(per-token log-probabilities of chosen, of rejected)] of each pair: every answer a sequence of its own, by the
    stock forward pass.
    """
    out = []
    for r in rows:
        grids = [encoder.tiler.grid(*image_size(image)) for image in r.images]
        tiles = [torch.from_numpy(encoder.tiler.tiles(image)) for image in r.images]
        pixels = ((torch.cat(tiles).float() / 255 - 0.5) / 0.5)[None] if tiles else None
        for conversation in r.conversations:
            answers = []
            for one in encoder.branches(conversation, grids):
                ids = torch.from_numpy(one.input_ids.astype("int64"))[None]
                logits = (
                    model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0].float()
                )
                trained = torch.from_numpy(one.trained.nonzero()[0])
                answers.append(torch.log_softmax(logits[trained - 1], -1).gather(1, ids[0, trained][:, None])[:, 0])
            out.append(answers)
    return out


def by_the_papers(policy, reference, settings):
    """The loss and TRL's metrics of a batch of pairs, pair by pair."""
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    beta, smoothing, losses, rewards = settings.beta, settings.label_smoothing, [], []
    for (chosen, rejected), (was_chosen, was_rejected) in zip(policy, reference, strict=True):
        up, down = chosen.sum() - was_chosen.sum(), rejected.sum() - was_rejected.sum()
        of = {
            "sigmoid": -torch.log(torch.sigmoid(beta * (up - down))),
            "hinge": torch.clamp(1 - beta * (up - down), min=0),
            "ipo": (up / len(chosen) - down / len(rejected) - 1 / (2 * beta)) ** 2,
            "robust": (
                -(1 - smoothing) * F.logsigmoid(beta * (up - down)) + smoothing * F.logsigmoid(beta * (down - up))
            )
            / (1 - 2 * smoothing),
        }
        losses.append(sum(w * of[kind] for kind, w in zip(settings.loss_type, weights, strict=True) if kind != "sft"))
        rewards.append(
            [
                float(v.detach())
                for v in (beta * up, beta * down, (up > down).float(), beta * (up - down), chosen.sum(), rejected.sum())
            ]
        )
    loss = torch.stack(losses).mean()
    if "sft" in settings.loss_type:
        loss = loss - weights[settings.loss_type.index("sft")] * torch.cat([chosen for chosen, _ in policy]).mean()
    return loss, dict(zip(PREFERENCE_METRICS, torch.tensor(rewards).mean(0).tolist(), strict=True))


def normalisers(batch):
    chosen = int((batch.target_completion % 2 == 0).sum())
    return Normalisers(batch.samples, batch.label_tokens, chosen)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "mixed") for case in CASES), *(("mixed", kind) for kind in LOSSES if kind != "mixed")]
)
def test_packed_pairs_have_the_loss_and_gradients_of_single_answers(models, encoder, case, kind):
    assert_as_single_answers(*models, encoder, CASES[case], LOSSES[kind])


def test_packed_pairs_of_a_published_model_have_the_loss_and_gradients_of_single_answers(published_path):
    encoder = encoder_of(load_processor(ModelConfig(path=published_path)), max_length=4096)
    assert_as_single_answers(*in_training(published_path), encoder, CASES["mixed"], LOSSES["mixed"])


def assert_as_single_answers(model, reference, encoder, rows, settings):
    """Loss, metrics and gradients of a packed batch are by_the_papers of each answer alone."""
    (batch,) = batches_of(rows, encoder)
    with torch.no_grad():
        was = answers_alone(reference, rows, encoder)
    want, want_metrics = by_the_papers(answers_alone(model, rows, encoder), was, settings)
    want_gradients = gradients(model, want)

    run = RunConfig(method="dpo", dpo=settings)
    ask = reference_of(reference, run)
    batch = type(batch)(**(batch.__dict__ | {"reference_logps": ask(model, batch)}))
    loss, metrics = objective_of(run).loss(model.lm_head, target_states(model, batch), batch, normalisers(batch))
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for name in PREFERENCE_METRICS:
        assert metrics[name].item() == pytest.approx(want_metrics[name], rel=1e-5, abs=1e-5), name
    got = gradients(model, loss)
    norm = torch.sqrt(sum((g**2).sum() for g in want_gradients.values()))
    none = torch.zeros(())
    for parameter in want_gradients.keys() | got.keys():  # a text-only batch runs a dummy tile of weight zero
        assert float((want_gradients.get(parameter, none) - got.get(parameter, none)).norm() / norm) < 1e-5, parameter


@pytest.mark.parametrize("case", CASES)
def test_a_pair_shares_its_prompt_and_its_images(encoder, case):
    """One pass of the vision tower an image, the prompt's tokens once."""
    rows = CASES[case]
    (batch,) = batches_of(rows, encoder)
    assert len(batch.ends) == 2 * batch.samples and batch.samples == sum(len(r.conversations) for r in rows)
    assert len(batch.pixel_values) == sum(
        len(encoder.tiler.tiles(image)) for image in {image for r in rows for image in r.images}
    )
    apart = 0
    for r in rows:
        grids = [encoder.tiler.grid(*image_size(image)) for image in r.images]
        apart += sum(len(one.input_ids) for c in r.conversations for one in encoder.branches(c, grids))
    assert batch.meta["tokens"] < 0.75 * apart


def test_contributions_of_micro_batches_add_up_to_the_whole(models, processor):
    model, _ = models
    encoder, rows = encoder_of(processor, {"longest_edge": 128}, max_length=4096), CASES["mixed"]
    batch = whole(rows, encoder)
    assert normalisers(batch).chosen_tokens < normalisers(batch).label_tokens
    parts = [whole([r], encoder) for r in rows]
    with torch.no_grad():
        contributions = []
        for b in (batch, *parts):
            b = type(b)(**(b.__dict__ | {"reference_logps": torch.arange(len(b.ends)) % 2 * -1.0}))
            contributions.append(dpo(model.lm_head, target_states(model, b), b, normalisers(batch), LOSSES["mixed"]))
    assert sum(loss for loss, _ in contributions[1:]).item() == pytest.approx(contributions[0][0].item(), rel=1e-6)
    for name in PREFERENCE_METRICS:
        assert sum(m[name] for _, m in contributions[1:]).item() == pytest.approx(
            contributions[0][1][name].item(), rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize("reference", ["auto", "adapter", "copy"])
def test_the_reference_stays_the_model_that_training_began_with(tiny_path, processor, reference):
    lora = {"lora": {"r": 4}, "model": {"path": tiny_path, "dtype": "float32", "train": []}}
    config = RunConfig(method="dpo", dpo={"reference": reference}, **lora)
    model = prepare_for_training(load_model(config.model), config)
    ask = reference_of(model, config)
    batch = whole(CASES["mixed"], encoder_of(processor, {"longest_edge": 128}, max_length=4096))
    before, trains = ask(model, batch), [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    after = ask(model, batch)
    assert torch.equal(before, after) and not after.requires_grad
    assert [p.requires_grad for p in model.parameters()] == trains
    now = target_states(model, batch)
    assert not torch.allclose(now, target_states(base_model(load_model(config.model)), batch)), (
        "the adapters are on again"
    )


def test_a_frozen_copy_is_taken_where_weights_train_in_full(tiny_path, processor):
    config = RunConfig(method="dpo", model={"path": tiny_path, "dtype": "float32"})
    model = prepare_for_training(load_model(config.model), config)
    ask = reference_of(model, config)
    batch = whole(CASES["one pair"], encoder_of(processor, {"longest_edge": 128}, max_length=4096))
    before = ask(model, batch)
    with torch.no_grad():
        model.model.text_model.norm.weight.mul_(1.5)
    assert torch.equal(before, ask(model, batch))
    assert reference_of(model, RunConfig(method="dpo", dpo={"reference": "precompute"})) is None


def test_the_reference_answer_of_a_pair_is_the_chosen_one(processor):
    record = question_record(SHAPE)
    assert record["question"] == "what shape?" and record["answer"] == "a circle" and record["answers"] == ["a circle"]
    assert question_record(TURNS)["answer"] == "yes it is" and question_record(TURNS)["question"] == "sure?"
    encoder = encoder_of(processor, {"longest_edge": 128}, max_length=4096)
    rows = CASES["answers within the prompt"]
    prompts = collate_prompts([Group(r, tuple(range(len(r.conversations)))) for r in rows], encoder)
    assert [r["answer"] for r in prompts.meta["records"]] == ["yes it is", "blue"]
    assert (
        encoder.tokenizer.decode(prompts.input_ids[0][prompts.branch[0] != 2])
        .rstrip()
        .endswith("sure?<end_of_utterance>\nAssistant:")
    )


def test_dpo_refuses_dropout():
    with pytest.raises(
        ConfigError, match=r"lora\.lora_dropout = 0\.1 with method = dpo.*nearest: lora\.lora_dropout=0"
    ):
        load_config(None, ["method=dpo", "lora={lora_dropout: 0.1}"])


def test_zero_3_refuses_a_frozen_copy():
    with pytest.raises(
        ConfigError,
        match=r"dpo\.reference = auto, a frozen copy, with engine\.stage = 3.*nearest: dpo\.reference=precompute",
    ):
        load_config(None, ["method=dpo", "engine.stage=3"])
    load_config(None, ["method=dpo", "engine.stage=3", "lora={r: 4}", "model.train=[]"])
