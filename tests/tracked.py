"""A run's folder as its workers leave it: settings, a log with a resume, an evaluation with images, checkpoints."""

import json
from pathlib import Path

from smolray.config import RunConfig, load_config, to_yaml
from smolray.run.folder import RunFolder
from smolray.run.predictions import write_predictions
from tests.offline import picture

NOW = 1_800_000_000.0
IMAGES = {"a": picture(32, 24), "b": picture(24, 32)}


def step(number: int, attempt: int = 1, **fields) -> dict:
    """The event of a step."""
    numbers = {"loss": 1 / number, "grad_norm": 1.0, "learning_rate": 1e-4, "samples": 80, "tokens": 4000}
    numbers |= {"seconds": 2.0, "data_wait_seconds": 0.1, "memory_bytes": 2**30, "epoch": number / 10}
    return {"event": "step", "time": NOW + number, "attempt": attempt, "step": number} | numbers | fields


def end(status: str = "finished", number: int = 4) -> dict:
    return {"event": "end", "time": NOW + 99, "attempt": 2, "status": status, "step": number, "seconds": 9.0}


def tracked_run(folder: Path, *settings: str) -> RunConfig:
    """A run that trained 3 steps, was resumed from step 2, trained to step 4 and evaluated; without its end."""
    config = load_config(None, ["name=demo", f"storage={folder}", "data.train=data", *settings])
    run = Path(config.run_dir)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    start = {"event": "start", "time": NOW, "attempt": 1, "workers": 1, "total_steps": 4, "config": {}}
    metrics = {"cer": {"overall": {"value": 0.25, "low": 0.2, "high": 0.3, "samples": 3}}}
    about = {"attempt": 2, "step": 4}
    add_events(
        config,
        start,
        *(step(n) for n in (1, 2, 3)),
        start | {"attempt": 2},
        {"event": "resume", "time": NOW + 4, "attempt": 2, "step": 2},
        *(step(n, 2, loss=n) for n in (3, 4)),
        {"event": "evaluate", "time": NOW + 6, "accuracy": {"overall": 0.5, "yes/no": 0.25}, "metrics": metrics}
        | about,
        {"event": "checkpoint", "time": NOW + 7, "path": RunFolder(config.run_dir).checkpoint(4), "loss": 4.0} | about,
    )
    texts = {"type": "colour", "question": "What colour?", "answer": "red", "answers": ["red"]}
    said = [("1", "a", "red", True), ("2", "b", "blue", False), ("3", "elsewhere", "red", True)]
    names = ("id", "key", "prediction", "correct")
    write_predictions(config.run_dir, 4, [texts | dict(zip(names, one, strict=True)) for one in said])
    return config


def add_events(config: RunConfig, *events: dict) -> None:
    """Append to the log of a run."""
    with Path(RunFolder(config.run_dir).events).open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
