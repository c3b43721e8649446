"""Continuous batching answers as decoding together or alone does, token for token; slots and pages come back."""

import random

import pytest
import torch

from smolray.config import ModelConfig
from smolray.data.collate import Group, collate_prompts, collate_training
from smolray.data.processor import load_processor
from smolray.data.sample import Conversation, Sample
from smolray.model.decoding import greedy, stop_ids_of
from smolray.model.load import load_model
from smolray.serve.answer import Answer, Asked
from smolray.serve.engine import Engine, EngineLimits
from smolray.serve.errors import ApiError
from smolray.serve.prompt import PromptMaker
from tests.losses import sft_sum
from tests.offline import asked, encoder_of, message, picture, shard_row, words

pytestmark = pytest.mark.seconds

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def encoder(tiny_path):
    return encoder_of(load_processor(ModelConfig(path=tiny_path)), {"longest_edge": 128}, max_length=4096)


@pytest.fixture(scope="module")
def samples():
    """40 questions about five images of several sizes, one about two images, one about none, and a longer talk."""
    rng = random.Random(0)
    pictures = [
        picture(*size, seed) for seed, size in enumerate([(64, 64), (120, 64), (40, 120), (128, 128), (50, 60)])
    ]
    found = [Sample((rng.choice(pictures),), asked(words(rng), words(rng, 4), 1, f"q{n}")) for n in range(40)]
    found.append(Sample(tuple(pictures[:2]), asked("and both?", "a red box", 2)))
    found.append(Sample((), asked("4 and 4?", "8 or so", 0)))
    turns = (message("user", None, "what?"), message("assistant", "a box"), message("user", "and now?"))
    found.append(Sample((pictures[0],), Conversation("turns", (*turns, message("assistant", "a blue one")))))
    return found


@pytest.fixture(scope="module")
def model(tiny_path, encoder, samples):
    """A few seconds of training, so that answers and their lengths vary from prompt to prompt."""
    torch.manual_seed(0)
    model = load_model(ModelConfig(path=tiny_path, dtype="float32")).train()
    batch = collate_training([group(sample) for sample in samples], encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (sft_sum(model, batch) / batch.label_tokens).backward()
        optimizer.step()
    return model.eval()


def group(sample):
    return Group(shard_row(list(sample.images), sample.conversation), (0,))


@pytest.fixture(scope="module")
def want(model, encoder, samples):
    """The token ids of each answer, decoded alone."""
    stops = stop_ids_of(model, encoder)
    found = [greedy(model, collate_prompts([group(s)], encoder), NEW_TOKENS, stops)[0] for s in samples]
    assert len({tuple(ids) for ids in found}) > 10 and len({len(ids) for ids in found}) > 3, "the answers do not vary"
    return found


def engine_of(model, encoder, **limits):
    made = Engine(model, stop_ids_of(model, encoder), EngineLimits(**{"queue": 1000, **limits}), torch.device("cpu"))
    return made


def ask(engine, encoder, sample, stream=True, **how):
    """An answer in line; `.pieces` is what it tells."""
    pieces = []
    settings = Asked(**{"max_new_tokens": NEW_TOKENS, **how})
    answer = Answer(PromptMaker(encoder)(sample), settings, encoder.tokenizer, pieces.append, stream)
    answer.pieces = pieces
    engine.submit(answer)
    return answer


def finish(engine, most=10_000):
    for _ in range(most):
        if not engine.work.is_set():
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def text_of(encoder, ids):
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("slots", [1, 3, 32])
def test_answers_that_come_and_go_are_those_of_decoding_alone(model, encoder, samples, want, slots):
    engine, rng, answers = engine_of(model, encoder, slots=slots), random.Random(1), {}
    order = rng.sample(range(len(samples)), len(samples))
    while order or engine.work.is_set():
        for _ in range(rng.randint(0, 4)):
            if order:
                number = order.pop()
                answers[number] = ask(engine, encoder, samples[number])
        engine.step()
        assert len(engine.running) <= slots
    assert [answers[n].ids for n in range(len(samples))] == want
    texts = ["".join(piece.text for piece in answers[n].pieces) for n in range(len(samples))]
    assert texts == [text_of(encoder, ids) for ids in want]
    ends = [answers[n].pieces[-1].finish for n in range(len(samples))]
    assert ends == ["length" if len(ids) == NEW_TOKENS else "stop" for ids in want] and len(set(ends)) == 2
    assert engine.state()["pages_in_use"] == 0


def test_an_image_is_encoded_once_and_its_tokens_are_computed_once_for_all_questions(model, encoder, samples, want):
    engine = engine_of(model, encoder)
    about_one = [n for n, sample in enumerate(samples[:40]) if sample.images == samples[0].images]
    assert len(about_one) > 4
    answers = [ask(engine, encoder, samples[n]) for n in about_one]
    finish(engine)
    assert [answer.ids for answer in answers] == [want[n] for n in about_one]
    assert engine.counts.images_encoded == 1
    prompts = [len(answer.prompt.ids) for answer in answers]
    shared = answers[-1].cached_tokens
    assert answers[0].cached_tokens == 0 and shared > 0.5 * prompts[-1]
    assert engine.counts.cached_tokens >= (len(answers) - 1) * shared - 16 * len(answers)
    again = ask(engine, encoder, samples[about_one[0]])
    finish(engine)
    assert again.ids == want[about_one[0]] and again.cached_tokens == (prompts[0] - 1) // 16 * 16


def test_pages_are_shared_only_by_the_same_pictures(model, encoder, samples, want):
    """Two images of one size have the same tokens."""
    engine = engine_of(model, encoder)
    for seed in range(3):
        sample = Sample((picture(64, 64, 100 + seed),), samples[0].conversation)
        alone = greedy(model, collate_prompts([group(sample)], encoder), NEW_TOKENS, engine.stop_ids)[0]
        answer = ask(engine, encoder, sample)
        finish(engine)
        assert answer.ids == alone and answer.cached_tokens == 0


def test_little_memory_makes_answers_wait_and_loses_none(model, encoder, samples, want):
    longest = max(len(PromptMaker(encoder)(sample).ids) for sample in samples) + NEW_TOKENS
    page = engine_of(model, encoder).memory.keys[:, :, 0].nbytes * 2
    engine = engine_of(model, encoder, kv_bytes=page * (longest // 16 + 2))
    answers = [ask(engine, encoder, sample) for sample in samples]
    finish(engine)
    assert [answer.ids for answer in answers] == want
    assert engine.state()["pages_in_use"] == 0
    with pytest.raises(ApiError, match="this service has memory for") as refused:
        ask(engine, encoder, samples[0], max_new_tokens=longest + 40)
    assert refused.value.status == 400


def test_a_cancelled_answer_gives_back_its_slot_and_pages_and_harms_no_other(model, encoder, samples, want):
    engine, rng = engine_of(model, encoder, slots=8), random.Random(2)
    answers = [ask(engine, encoder, sample) for sample in samples]
    gone = set()
    while engine.work.is_set():
        engine.step()
        if rng.random() < 0.5 and (left := [a for a in answers if not a.cancelled and not ended(a)]):
            one = rng.choice(left)
            gone.add(answers.index(one))
            engine.cancel(one)
    assert len(gone) > 5 and engine.counts.cancelled == len(gone)
    assert [answers[n].ids for n in range(len(want)) if n not in gone] == [
        ids for n, ids in enumerate(want) if n not in gone
    ]
    assert engine.state() | {"pages_in_use": 0, "running": 0, "waiting": 0} == engine.state()


def ended(answer):
    return bool(answer.pieces and answer.pieces[-1].finish)


def test_a_full_line_is_told(model, encoder, samples):
    engine = engine_of(model, encoder, slots=1, queue=1)
    for _ in range(2):
        ask(engine, encoder, samples[0])
    with pytest.raises(ApiError, match="2 requests are under way") as refused:
        ask(engine, encoder, samples[0])
    assert refused.value.status == 429 and refused.value.retry_after
    finish(engine)
    ask(engine, encoder, samples[0])


def test_sampled_answers_depend_on_their_seed_and_name_alone(model, encoder, samples, want):
    how = {"temperature": 1.0, "top_p": 0.9, "name": "one"}
    engine = engine_of(model, encoder)
    first = ask(engine, encoder, samples[0], seed=1, **how)
    finish(engine)
    crowd = [ask(engine, encoder, sample, seed=1, **how) for sample in samples]
    other = ask(engine, encoder, samples[0], seed=2, **how)
    cold = ask(engine, encoder, samples[1], temperature=1e-4, seed=1)
    finish(engine)
    assert crowd[0].ids == first.ids != other.ids
    assert cold.ids == want[1]


def test_an_answer_ends_before_a_stop_text_and_streams_no_part_of_it(model, encoder, samples, want):
    number = max(range(len(want)), key=lambda n: len(text_of(encoder, want[n])))
    text = text_of(encoder, want[number])
    for start in range(1, len(text) - 3, len(text) // 4):
        stop = text[start : start + 3]
        engine = engine_of(model, encoder)
        answer = ask(engine, encoder, samples[number], stop=("never in it", stop))
        finish(engine)
        told = "".join(piece.text for piece in answer.pieces)
        assert told == text[: text.index(stop)].strip() and answer.pieces[-1].finish == "stop"


def test_a_whole_answer_is_told_once(model, encoder, samples):
    engine = engine_of(model, encoder)
    streamed, whole = (ask(engine, encoder, samples[0], stream, top_logprobs=1) for stream in (True, False))
    finish(engine)
    assert len(whole.pieces) == 1 < len(streamed.pieces)
    assert whole.pieces[0].text == "".join(piece.text for piece in streamed.pieces)
    logprobs = [one["logprob"] for piece in streamed.pieces for one in piece.logprobs]
    assert [one["logprob"] for one in whole.pieces[0].logprobs] == pytest.approx(logprobs, abs=1e-5)
    assert whole.pieces[0].finish == streamed.pieces[-1].finish


def test_logprobs_are_those_of_the_model(model, encoder, samples, want):
    engine = engine_of(model, encoder)
    answer = ask(engine, encoder, samples[0], top_logprobs=3)
    finish(engine)
    told = [one for piece in answer.pieces for one in piece.logprobs]
    assert len(told) == len(want[0])
    ids = torch.tensor([[*answer.prompt.ids.tolist(), *want[0]]])
    pixels = (torch.from_numpy(answer.prompt.images[0].tiles).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels[None]).logits[0].log_softmax(-1)
    for place, (token, one) in enumerate(zip(want[0], told, strict=True), len(answer.prompt.ids) - 1):
        assert one["logprob"] == pytest.approx(float(logits[place, token]), abs=1e-4)
        assert one["top_logprobs"][0]["logprob"] == one["logprob"] and len(one["top_logprobs"]) == 3
        assert bytes(one["bytes"]).decode() == one["token"]


def test_where_memory_runs_out_those_answers_fail_and_others_go_on(model, encoder, samples, want, monkeypatch):
    engine = engine_of(model, encoder)
    first = ask(engine, encoder, samples[0])
    engine.step()
    real = engine._prefill

    def out_of_memory(group):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(engine, "_prefill", out_of_memory)
    second = ask(engine, encoder, samples[1])
    engine.step()
    monkeypatch.setattr(engine, "_prefill", real)
    third = ask(engine, encoder, samples[2])
    finish(engine)
    assert second.pieces[-1].finish == "error" and "out of memory" in second.pieces[-1].error
    assert (first.ids, third.ids) == (want[0], want[2])
    assert engine.state()["pages_in_use"] == 0 and engine.counts.failed == 1
