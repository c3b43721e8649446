"""What a service is asked to serve, by the names on its command line."""

import pytest

from smolray.inference.shared import groups
from smolray.run.checkpoint import CheckpointError
from smolray.serve.deployment import find_sources
from smolray.serve.settings import ServeSettings
from tests.serving import lora_run


def test_each_model_may_name_a_checkpoint_of_its_run(tmp_path, tiny_path):
    for step in (1, 2):
        lora_run(tmp_path, tiny_path, "run", step)
    base = tmp_path / "me@home"
    base.symlink_to(tiny_path)

    def found(*models):
        return find_sources(ServeSettings(models=[*models], storage=str(tmp_path)))

    sources = found("run@step-00000001", "run@latest", "run", str(base))
    steps = {name: source.checkpoint.step for name, source in sources.items() if source.checkpoint}
    assert steps == {"run@step-00000001": 1, "run@latest": 2, "run": 2}
    assert groups(found("run@step-00000001", "run")) == [found("run@step-00000001", "run")], "on one base"
    with pytest.raises(CheckpointError, match="step-00000003"):
        found("run@step-00000003")
