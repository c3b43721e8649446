"""A user's class follows the run; one that is wrong is refused before it, one that raises does not stop it."""

import pytest

from smolray.config import ConfigError, load_config
from smolray.launch.session import started_run
from smolray.tracking.feed import fed
from smolray.tracking.registry import check_tracking, consumers_of
from tests.tracked import add_events, end, step, tracked_run

MODULE = """
seen = []

class Mine:
    def on_start(self, event): seen.append(("start", event["total_steps"]))
    def on_step(self, event):
        seen.append(("step", event["step"], event["loss"]))
        raise ValueError("mine is broken")
    def on_checkpoint(self, event): seen.append(("checkpoint", event["path"]))
    def on_end(self, event): seen.append(("end", event["status"]))

class Nothing:
    pass

class Wants:
    def __init__(self, x): ...
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The name of a module of the user in the current folder."""
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_callback_gets_this_attempts_events_and_may_raise(tmp_path, module):
    import importlib

    config, said = tracked_run(tmp_path, f"callbacks=['{module}:Mine']"), []
    consumers = list(consumers_of(config, dict, said.append))
    start = {"event": "start", "time": 1.0, "attempt": 3, "total_steps": 6, "config": {}}
    with fed(config.run_dir, consumers, said.append, 30):
        checkpoint = {"event": "checkpoint", "time": 1.0, "attempt": 3, "step": 6, "path": "here"}
        add_events(config, start, step(5, 3), step(6, 3), checkpoint, end())
    seen = importlib.import_module(module).seen
    assert seen == [("start", 6), ("step", 5, 0.2), ("step", 6, 1 / 6), ("checkpoint", "here"), ("end", "finished")]
    assert said[-1] == f"{module}:Mine.on_step raised ValueError: mine is broken; the run goes on" and len(said) == 2


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_module:Mine", "cannot be made: ModuleNotFoundError"),
        ("{module}:Missing", "cannot be made: AttributeError"),
        ("{module}:Wants", "cannot be made: TypeError"),
        ("{module}:Nothing", "has none of the methods on_start, on_step"),
    ],
)
def test_a_callback_that_cannot_be_called_is_refused_before_the_run(tmp_path, module, path, why):
    config = load_config(
        None, [f"storage={tmp_path}/runs", "data.train=x", f"callbacks=[{path.format(module=module)!r}]"]
    )
    with pytest.raises(ConfigError, match=why):
        check_tracking(config)
    with pytest.raises(ConfigError, match=why), started_run(config):
        pass
    assert not (tmp_path / "runs" / "run" / "events.jsonl").exists()


def test_a_path_that_names_no_class_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="callbacks"):
        load_config(None, ["callbacks=[my_module]"])
