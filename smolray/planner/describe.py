"""A Plan as a person reads it, and as JSON.

In: Plan. Out: a table of strategies, the choice in words, a dict of plain values.
"""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from smolray.planner.candidate import Candidate
from smolray.planner.evaluation import EvaluationBatch, evaluation_batch
from smolray.planner.gpu_sets import Place
from smolray.planner.idle import idle_gpus, remedies
from smolray.planner.inventory import counted
from smolray.planner.plan import Plan

HEADER = f"{'strategy':<27} {'GB a GPU':>8} {'s/step':>8} {'samples/s':>10}  limited by"


def strategies_table(plan: Plan) -> RenderableType:
    """Two lines for each strategy: its numbers, and on which GPUs with which micro-batches. At most 80 columns.

    Each is shown with its best settings that fit, or with those that lack least memory. The chosen one is bold.
    """
    lines: list[RenderableType] = [Text(HEADER, style="dim")]
    for row in plan.rows:
        style = "bold" if row is plan.chosen else "" if row.fits else "dim"
        lines.append(Text(_numbers(row), style=style, no_wrap=True))
        lines.append(Padding(Text(_setup(row), style=style), (0, 0, 0, 2)))
    return Group(*lines)


def _numbers(row: Candidate) -> str:
    gigabytes, limit = _fullest(row)[0] / 1e9, row.limit if row.fits else "does not fit"
    return f"{row.name:<27} {gigabytes:>8.1f} {row.time.total:>8.3g} {row.samples_per_second:>10.1f}  {limit}"


def _setup(row: Candidate) -> str:
    checkpointed = ", checkpointed" if row.checkpointing else ""
    lacking = "" if row.fits else f"; {row.limit}"
    return f"{counted(row.names)}: {_micro_batches(row)} of {row.micro_batch}{checkpointed}{lacking}"


def words(plan: Plan) -> str:
    """The choice and its reason: one sentence on each line."""
    lines = []
    if plan.statistics.assumed:
        lines.append(
            f"The data is not prepared yet. Assumed: images of {plan.statistics.most_tiles} tiles with "
            f"{plan.statistics.questions_per_row:g} short questions each."
        )
    lines += [f"{'Not used' if plan.rows else 'Refused'}: {reason}." for reason in plan.refused.values()]
    written = plan.as_written
    if written is not None and not written.fits:
        lines.append(
            f"As written ({_engine(written)}, micro-batch {written.micro_batch}) the run does not fit: {written.limit}."
        )
    if plan.chosen is not None:
        return "\n".join([*lines, *_choice(plan, plan.chosen)])

    if plan.rows:
        nearest = min(plan.rows, key=lambda row: row.missing)
        lines.append(
            f"Nothing fits on {plan.inventory.describe()}. Nearest is {_engine(nearest)} with micro-batch "
            f"{nearest.micro_batch}{' and checkpointing' if nearest.checkpointing else ''}: {nearest.limit}."
        )
    else:
        lines.append(f"None of the GPUs can run this: {plan.inventory.describe()}.")
    if plan.change is None or plan.changed is None or plan.changed.chosen is None:
        lines.append(
            "LoRA, quantisation and smaller images do not make it fit: a smaller model or a larger GPU is needed."
        )
        return "\n".join(lines)

    settings = " ".join(f"{key}={_setting(value)}" for key, value in plan.change.settings.items())
    lines.append(f"It fits with {plan.change.words} ({settings}):")
    return "\n".join([*lines, *_choice(plan.changed, plan.changed.chosen)])


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain values: the model, the data, the inventory, every row, the choice, its settings and the words.

    Sizes are in bytes, times in seconds.
    """
    return {
        "model": {"path": plan.config.model.path, "parameters": plan.shape.parameters, "groups": plan.shape.groups},
        "data": {
            "tiles_per_row": plan.statistics.tiles_per_row,
            "questions_per_row": plan.statistics.questions_per_row,
            "tokens_per_sample": plan.statistics.tokens_per_sample,
            "label_tokens_per_sample": plan.statistics.label_tokens_per_sample,
            "longest": plan.statistics.longest,
            "most_tiles": plan.statistics.most_tiles,
            "samples": plan.statistics.samples,
            "assumed": plan.statistics.assumed,
        },
        "inventory": plan.inventory.to_json(),
        "strategies": [candidate_json(row) | {"chosen": row is plan.chosen} for row in plan.rows],
        "remedies": [
            {"words": remedy.words, "settings": remedy.settings, "candidate": candidate_json(remedy.candidate)}
            for remedy in remedies(plan)
        ],
        "refused": {gpu.name: reason for gpu, reason in plan.refused.items()},
        "chosen": candidate_json(plan.chosen) if plan.chosen else None,
        "evaluation": asdict(batch) if (batch := _evaluation_batch(plan)) else None,
        "as_written": candidate_json(plan.as_written) if plan.as_written else None,
        "change": asdict(plan.change) if plan.change else None,
        "changed": to_json(plan.changed) if plan.changed else None,
        "settings": plan.settings(),
        "words": words(plan),
    }


def candidate_json(row: Candidate) -> dict[str, Any]:
    """A candidate as plain values: its settings, bytes by part on each GPU, seconds of a step by part."""
    return {
        "strategy": row.strategy,
        "name": row.name,
        "fits": row.fits,
        "limit": row.limit,
        "gpus": [list(place) for place in row.gpus],
        "gpu_names": list(row.names),
        "micro_batch": row.micro_batch,
        "micro_batches": row.micro_batches,
        "checkpointing": row.checkpointing,
        "zero": asdict(row.zero) if row.zero else None,
        "shares": list(row.shares),
        "partition": list(row.partition),
        "replicas": row.replicas,
        "bytes": [
            {**asdict(m), "total": m.total, "capacity": c} for m, c in zip(row.memory, row.capacity, strict=True)
        ],
        "seconds": {**asdict(row.time), "total": row.time.total},
        "samples_per_second": row.samples_per_second,
    }


def _choice(plan: Plan, chosen: Candidate) -> list[str]:
    """The chosen candidate: its speed, its memory, its stages or shares, and why not the others."""
    where = "" if len(chosen.gpus) == 1 else f" on {len(chosen.gpus)} GPUs"
    checkpointed = ", layers checkpointed" if chosen.checkpointing else ""
    most, gpu = _fullest(chosen)
    lines = [
        f"Chosen: {_engine(chosen)}{where} ({counted(chosen.names)}): {chosen.samples_per_second:.1f} samples/s, "
        f"{chosen.time.total:.3g} s a step of {chosen.samples:.0f} conversations in {_micro_batches(chosen)} "
        f"of at most {chosen.micro_batch}{checkpointed}.",
        f"The fullest GPU ({chosen.names[gpu]}) holds {most / 1e9:.1f} of {chosen.capacity[gpu] / 1e9:.1f} GB that may "
        f"be used. The step is limited by {chosen.time.limit}.",
    ]

    if batch := _evaluation_batch(plan):
        lines.append(
            f"An evaluation answers {batch.sequences} sequences of {batch.longest:,} tokens, the longest, at once, or "
            f"shorter ones up to {batch.tokens:,} tokens and {plan.config.evaluate.batch_size} questions."
        )

    if chosen.partition:
        lines += _stages(plan, chosen)
    elif len(set(chosen.names)) > 1:
        lines.append(_shares(chosen))

    lines += _others(plan, chosen)
    if idle := idle_gpus(plan):
        lines += _idle(plan, chosen, idle)
    return lines


def _evaluation_batch(plan: Plan) -> EvaluationBatch | None:
    """The batch of an evaluation under the chosen plan."""
    chosen = plan.chosen
    return evaluation_batch(chosen, plan.config, plan.shape, plan.statistics.longest) if chosen else None


def _stages(plan: Plan, chosen: Candidate) -> list[str]:
    """Which layers each stage holds, and on which GPUs: one line for each stage."""
    lines, start, stages = [], 0, len(chosen.partition)
    layers = [layer.name for layer in plan.shape.layers]
    for stage, size in enumerate(chosen.partition):
        end = start + size
        held = layers[start] if size == 1 else f"{layers[start]} to {layers[end - 1]}"
        ranks = [replica * stages + stage for replica in range(chosen.replicas)]
        gpus = [f"{chosen.names[r]} in {plan.inventory.nodes[chosen.gpus[r][0]].name}" for r in ranks]
        gigabytes = chosen.memory[stage].total / 1e9
        lines.append(f"  stage {stage}: {held} ({size} layers, {gigabytes:.1f} GB) on {', '.join(gpus)}")
        start = end
    return lines


def _shares(chosen: Candidate) -> str:
    """How many micro-batches of a step each GPU takes."""
    shares = ", ".join(f"{name} {share}" for name, share in zip(chosen.names, chosen.shares, strict=True))
    if chosen.zero and chosen.zero.stage == 3:
        return (
            f"Micro-batches of a step: {shares} (on stage 3 every pass is collective: the slowest GPU sets the pace)."
        )
    return f"Micro-batches of a step: {shares} (by speed)."


def _others(plan: Plan, chosen: Candidate) -> list[str]:
    """The fastest other strategy, and which do not fit."""
    others = [row for row in plan.rows if row.strategy != chosen.strategy]
    fitting, failed = [row for row in others if row.fits], [row for row in others if not row.fits]
    lines = []
    if fitting:
        second = max(fitting, key=lambda row: row.samples_per_second)
        lines.append(
            f"Next is {second.name} on {counted(second.names)} with {second.samples_per_second:.1f} samples/s, "
            f"limited by {second.limit}."
        )
    once = {row.limit: row for row in failed}.values()  # the last of those that fail for the same reason
    return [*lines, *(f"{row.name} does not fit: {row.limit}." for row in once)]


def _idle(plan: Plan, chosen: Candidate, idle: tuple[Place, ...]) -> list[str]:
    """The GPUs that the plan does not use, and what would make them pay."""
    names = counted(tuple(plan.inventory.nodes[node].gpus[gpu].name for node, gpu in idle))
    lines = [f"Left idle: {names}; no plan with more GPUs is faster by more than the prediction error."]
    for remedy in remedies(plan):
        then = remedy.candidate
        speed, times = then.samples_per_second, then.samples_per_second / chosen.samples_per_second
        lines.append(f"  With {remedy.words}: {speed:.1f} samples/s ({times:.2f} times) on {counted(then.names)}.")
    return lines


def _engine(row: Candidate) -> str:
    names = {
        "single": "a single GPU",
        "pipeline": f"a pipeline of {len(row.partition)} stages",
        "pipeline x data": f"{row.replicas} pipelines of {len(row.partition)} stages",
    }
    offload = row.name.removeprefix(row.strategy)
    return names.get(row.strategy, row.strategy.replace("zero-", "ZeRO-")) + offload


def _micro_batches(row: Candidate) -> str:
    return f"{row.micro_batches} micro-batch{'es' if row.micro_batches > 1 else ''}"


def _fullest(row: Candidate) -> tuple[float, int]:
    """Bytes on the GPU with the largest share of its memory filled, and its number."""
    gpu = max(range(len(row.memory)), key=lambda i: row.memory[i].total / row.capacity[i])
    return row.memory[gpu].total, gpu


def _setting(value: Any) -> str:
    """A value as it is written in an override."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
