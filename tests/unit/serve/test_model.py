"""A run with LoRA is served as `smolray generate` uses it; an engine that fails says so."""

import asyncio

import pytest
import torch

from smolray.data.sample import Conversation, Sample
from smolray.inference.predictor import find_model
from smolray.serve.answer import Asked
from smolray.serve.engine import EngineLimits
from smolray.serve.errors import ApiError
from smolray.serve.model import ServedModel
from tests.offline import message
from tests.serving import generated_answers, write_photos
from tests.unit.inference.test_predictor import exported_run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


async def whole(served, sample):
    pieces = [piece async for piece in served.chat(sample, Asked(), 16, stream=False)]
    assert len(pieces) == 1
    return pieces[0].text


def test_a_run_with_lora_answers_as_generate_does(tmp_path, tiny_path, photos):
    run = exported_run(tmp_path, tiny_path)
    expected = generated_answers(run, photos)
    served = ServedModel(find_model(str(run), "runs"), EngineLimits(), torch.device("cpu"))
    samples = [
        Sample(
            ((photos / photo).read_bytes(),),
            Conversation("", (message("user", None, prompt), message("assistant", ""))),
        )
        for photo, prompt in expected
    ]

    async def all_at_once():
        return await asyncio.gather(*(whole(served, sample) for sample in samples))

    assert asyncio.run(all_at_once()) == list(expected.values())
    served.close()


def test_an_engine_that_fails_tells_who_waits_and_who_comes(tiny_path, photos, monkeypatch):
    served = ServedModel(find_model(tiny_path, "runs"), EngineLimits(), torch.device("cpu"))
    served.check()

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(served.engine, "_prefill", broken)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    sample = Sample((), Conversation("", (message("user", "?"), message("assistant", ""))))
    for _ in range(2):
        with pytest.raises(ApiError, match="device-side assert") as told:
            asyncio.run(whole(served, sample))
        assert told.value.status == 503
    with pytest.raises(ApiError):
        served.check()
    served.close()
