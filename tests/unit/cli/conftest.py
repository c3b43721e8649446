"""A run that the commands read, and shards that previews show."""

import pytest

from smolray.data.sample import Conversation
from tests.commands import write_run
from tests.offline import asked, message, picture, shard_row
from tests.shards import write_shards

LONG = "word " * 300
TURNS = (
    message("user", None, "what?"),
    message("assistant", "a box"),
    message("user", None, "and?"),
    message("assistant", "two"),
)


@pytest.fixture
def run(tmp_path):
    """A run that is under way at step 20 of 100."""
    return write_run(tmp_path)


@pytest.fixture(params=["tiny_path", "published_path"])
def model_path(request):
    """A small model of our own, and the published files."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def rows():
    return [
        shard_row([picture(64, 64)], asked("what is it?", "a box")),
        shard_row([picture(120, 60), picture(64, 64, 2, form="JPEG")], Conversation("turns", TURNS)),
        shard_row([], asked("two and two?", "four", 0)),
        shard_row([picture(60, 60, 3)], asked("say <image> and \x1b[31m!", "no [red]tags[/red]")),
        shard_row([picture(60, 60, 4)], asked("long?", LONG, name="too-long"), asked("short?", "yes")),
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, rows):
    return write_shards(str(tmp_path_factory.mktemp("shards")), rows)
