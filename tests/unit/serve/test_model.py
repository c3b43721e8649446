"""Runs are served as `smolray generate` uses them, also several on one base; an engine that fails says so."""

import asyncio

import pytest
import torch

from smolray.data.sample import Conversation, Sample
from smolray.inference.predictor import find_model
from smolray.inference.shared import SharedModel, groups
from smolray.serve.answer import Asked
from smolray.serve.engine import EngineLimits
from smolray.serve.errors import ApiError
from smolray.serve.model import ServedModel
from tests.offline import message
from tests.serving import generated_answers, lora_run, write_photos
from tests.unit.inference.test_predictor import exported_run

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


async def whole(served, sample, model):
    pieces = [piece async for piece in served.chat(sample, Asked(model), 16, stream=False)]
    assert len(pieces) == 1
    return pieces[0].text


def sample_of(photos, photo, prompt):
    turns = (message("user", None, prompt), message("assistant", ""))
    return Sample(((photos / photo).read_bytes(),), Conversation("", turns))


def served_answers(sources, photos, questions):
    """The answers to (model, photo, prompt), all asked at once, and the service that gave them."""
    served = ServedModel(sources, EngineLimits(), torch.device("cpu"))

    async def all_at_once():
        return await asyncio.gather(*(whole(served, sample_of(photos, *one), model) for model, *one in questions))

    answers = asyncio.run(all_at_once())
    served.close()
    return dict(zip(questions, answers, strict=True)), served.engine


def test_a_run_with_lora_answers_as_generate_does(tmp_path, tiny_path, photos):
    run = exported_run(tmp_path, tiny_path)
    expected = {("run", *one): text for one, text in generated_answers(run, photos).items()}
    assert served_answers({"run": find_model(str(run), "runs")}, photos, [*expected])[0] == expected


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_path):
    """Runs of several kinds on one base, and the base, in the order that a service was given."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "text": {},
        "dora": {"lora": {"r": 4, "use_dora": True}},
        "all.parts": {"lora": {"r": 2, "use_rslora": True, "groups": ["text", "vision", "connector"]}},
        "connector": {"train": ["connector"]},
        "olora": {"lora": {"r": 4, "init_lora_weights": "olora"}},
        "whole": {"lora": {"r": 4, "modules_to_save": ["connector"]}},
        "second": {},
    }
    runs = {name: lora_run(folder, tiny_path, name, seed, **kind) for seed, (name, kind) in enumerate(kinds.items())}
    return {name: find_model(run, "runs") for name, run in runs.items()} | {"base": find_model(tiny_path, "runs")}


def test_runs_that_are_adapters_alone_share_their_base_and_others_do_not(sources):
    assert [[*group] for group in groups(sources)] == [
        ["text", "all.parts", "second", "base"],
        ["dora"],
        ["connector"],
        ["olora"],
        ["whole"],
    ]
    other = {"bf16": find_model(sources["base"].config.model.path, "runs", ["model.dtype=bfloat16"])}
    finder = {"finder": find_model(sources["base"].config.model.path, "runs", ["method=retrieval"])}
    assert len(groups(sources | other)) == len(groups(sources | finder)) == 6


def test_runs_on_one_base_answer_at_once_as_each_alone_and_hold_the_base_once(sources, photos):
    shared = groups(sources)[0]
    expected = {
        (name, *one): text
        for name, source in shared.items()
        for one, text in generated_answers(address_of(source), photos).items()
    }
    by_model = [[text for (name, *_), text in expected.items() if name == model] for model in shared]
    assert len({tuple(texts) for texts in by_model}) == len(shared), "adapters change nothing: this shows nothing"
    found, engine = served_answers(shared, photos, sorted(expected, key=lambda one: one[1:]))
    assert found == expected
    assert engine.counts.images_encoded == 2 * 4, "only adapters of the vision tower see a picture differently"
    assert engine.state()["pages_in_use"] == 0

    alone = {name: bytes_of(SharedModel({name: source}, torch.device("cpu")).model) for name, source in shared.items()}
    adapters = sum(alone.values()) - len(shared) * alone["base"]
    assert 0 < adapters < alone["base"] and bytes_of(engine.model) == alone["base"] + adapters


def address_of(source):
    """What names it for find_model."""
    return source.checkpoint.uri.partition("/checkpoints/")[0] if source.checkpoint else source.config.model.path


def bytes_of(model):
    return sum(
        storage.nbytes()
        for storage in {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}.values()
    )


def test_an_engine_that_fails_tells_who_waits_and_who_comes(tiny_path, photos, monkeypatch):
    served = ServedModel({"tiny": find_model(tiny_path, "runs")}, EngineLimits(), torch.device("cpu"))
    served.check()

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(served.engine, "_prefill", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    sample = Sample((), Conversation("", (message("user", "?"), message("assistant", ""))))
    for _ in range(2):
        with pytest.raises(ApiError, match="device-side assert") as told:
            asyncio.run(whole(served, sample, "tiny"))
        assert told.value.status == 503
    with pytest.raises(ApiError):
        served.check()
    served.close()
