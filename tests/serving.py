"""Questions, answers and a client, for tests of the service."""

import base64

from openai import OpenAI

from smolray.config import RunConfig
from smolray.inference.predictor import Decoding
from tests.offline import picture
from tests.unit.inference.test_predictor import asked
from tests.unit.test_export import write_run

PROMPTS = ("what is it?", "what colour is it? Answer\nin two lines.", "Describe the image.")


def write_photos(folder, count=4):
    """The folder with images of different sizes, 0.png and so on."""
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(64, 40 + 8 * number, number))
    return folder


def generated_answers(model, photos, prompts=PROMPTS, settings=()):
    """(photo, prompt) -> what `smolray generate` says in 16 tokens."""
    rows = asked(model, photos, Decoding(max_new_tokens=16), prompts=prompts, settings=settings)
    found = {(row["id"].partition("/")[0], row["prompt"]): row["text"] for row in rows}
    assert len(set(found.values())) > 5, "the answers do not vary: a test would show nothing"
    return found


def lora_run(folder, path, name, seed, lora=None, train=()):
    """The folder of a run of plain LoRA on the text model, or of another `lora`, on the model at `path`."""
    config = RunConfig(
        name=name,
        storage=str(folder),
        model={"path": path, "dtype": "float32", "train": list(train)},
        lora=lora or {"r": 4, "lora_alpha": 16},
        data={"train": str(folder)},
    )
    return write_run(folder, config, step=seed)


def client_of(address, key="none", **options):
    """OpenAI's own client, which does not try again."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120, **options)


def image_part(image, kind="png"):
    """An image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(image).decode()}"}}


def question(text, *images):
    """A user's message: images first, as in training."""
    return [{"role": "user", "content": [*map(image_part, images), {"type": "text", "text": text}]}]
