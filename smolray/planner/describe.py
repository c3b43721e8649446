"""A Plan as a person reads it: a table of strategies and the choice in words; and as JSON.

In: Plan. Out: a rich Table, text, a dict of plain values.
"""

from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from smolray.planner.candidate import Candidate
from smolray.planner.plan import Plan

COLUMNS = ("strategy", "gpus", "fits", "GB a card", "micro-batch", "s/step", "samples/s", "limited by")


def strategies_table(plan: Plan) -> Table:
    """One line a strategy: its best setting that fits, or the one that lacks least. The chosen one is bold."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(
            column,
            justify="left" if column in ("strategy", "gpus", "fits", "limited by") else "right",
            overflow="fold",
        )
    for row in plan.rows:
        most, _ = _fullest(row)
        style = "bold" if row is plan.chosen else None if row.fits else "dim"
        fits = "[green]yes[/]" if row.fits else "[red]no[/]"
        size = f"{row.micro_batch} x {row.micro_batches}{', checkpointed' if row.checkpointing else ''}"
        numbers = (
            f"{most / 1e9:.1f}",
            size,
            f"{row.time.total:.3g}",
            f"{row.samples_per_second:.1f}",
            escape(row.limit),
        )
        table.add_row(escape(row.name), escape(_names(row.names)), fits, *numbers, style=style)
    return table


def words(plan: Plan) -> str:
    """The choice and its reason, in sentences, a line each."""
    lines = []
    if plan.statistics.assumed:
        lines.append(
            f"The data are not prepared yet: taken for images of {plan.statistics.most_tiles} tiles with "
            f"{plan.statistics.questions_per_row:g} short questions each."
        )
    written = plan.as_written
    if written is not None and not written.fits:
        lines.append(
            f"As written ({_engine(written)}, micro-batch {written.micro_batch}) the run does not fit: {written.limit}."
        )
    if plan.chosen is not None:
        return "\n".join([*lines, *_choice(plan, plan.chosen)])
    nearest = min(plan.rows, key=lambda row: row.missing)
    lines.append(
        f"Nothing fits on {plan.inventory.describe()}. Nearest is {_engine(nearest)} with micro-batch {nearest.micro_batch}"
        f"{' and checkpointing' if nearest.checkpointing else ''}: {nearest.limit}."
    )
    if plan.change is None or plan.changed is None or plan.changed.chosen is None:
        lines.append(
            "No LoRA, no quantisation and no smaller image makes it fit: a smaller model or a larger card is needed."
        )
        return "\n".join(lines)
    settings = " ".join(f"{key}={_setting(value)}" for key, value in plan.change.settings.items())
    lines.append(f"It fits with {plan.change.words} ({settings}):")
    return "\n".join([*lines, *_choice(plan.changed, plan.changed.chosen)])


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain values: the model, the inventory, every row, the choice, its settings and the words."""
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
        "chosen": candidate_json(plan.chosen) if plan.chosen else None,
        "as_written": candidate_json(plan.as_written) if plan.as_written else None,
        "change": asdict(plan.change) if plan.change else None,
        "changed": to_json(plan.changed) if plan.changed else None,
        "settings": plan.settings(),
        "words": words(plan),
    }


def candidate_json(row: Candidate) -> dict[str, Any]:
    """One way to train: what is set, bytes by part for each card, seconds by part for a step."""
    return {
        "strategy": row.strategy,
        "name": row.name,
        "fits": row.fits,
        "limit": row.limit,
        "gpus": [list(place) for place in row.gpus],
        "card_names": list(row.names),
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
    most, gpu = _fullest(chosen)
    where = "" if len(chosen.gpus) == 1 else f" on {len(chosen.gpus)} cards"
    lines = [
        f"Chosen: {_engine(chosen)}{where} ({_names(chosen.names)}): {chosen.samples_per_second:.1f} samples/s, {chosen.time.total:.3g} s a step of "
        f"{chosen.samples:.0f} conversations in {chosen.micro_batches} micro-batch{'es' if chosen.micro_batches > 1 else ''} of at most {chosen.micro_batch}"
        f"{', layers checkpointed' if chosen.checkpointing else ''}.",
        f"The fullest card ({chosen.names[gpu]}) holds {most / 1e9:.1f} of {chosen.capacity[gpu] / 1e9:.1f} GB that may be used; "
        f"what takes longest is {chosen.time.limit}.",
    ]
    if chosen.partition:
        lines += _stages(plan, chosen)
    elif len(set(chosen.names)) > 1:
        dealt = ", ".join(f"{name} {share}" for name, share in zip(chosen.names, chosen.shares, strict=True))
        ruled = (
            "every pass is collective on stage 3, so that the slowest card rules"
            if chosen.zero and chosen.zero.stage == 3
            else "dealt by speed"
        )
        lines.append(f"Micro-batches of a step: {dealt} ({ruled}).")
    others = [row for row in plan.rows if row.fits and row.strategy != chosen.strategy]
    if others:
        second = max(others, key=lambda row: row.samples_per_second)
        lines.append(
            f"Next is {second.name} on {_names(second.names)} with {second.samples_per_second:.1f} samples/s, limited by {second.limit}."
        )
    failed = [row for row in plan.rows if not row.fits and row.strategy != chosen.strategy]
    lines += [f"{row.name} does not fit: {row.limit}." for row in {row.limit: row for row in failed}.values()]
    left = _left_out(plan, chosen)
    if left:
        lines.append(
            f"Left idle: {left}; of the plans tried none that uses more cards is faster by more than predictions err."
        )
    return lines


def _stages(plan: Plan, chosen: Candidate) -> list[str]:
    """Which layers each stage holds, and on which card."""
    lines, start = [], 0
    layers = [layer.name for layer in plan.shape.layers]
    for stage, size in enumerate(chosen.partition):
        end = start + size
        held = layers[start] if size == 1 else f"{layers[start]} to {layers[end - 1]}"
        stages = len(chosen.partition)
        gpus = [
            f"{chosen.names[r * stages + stage]} in {plan.inventory.nodes[chosen.gpus[r * stages + stage][0]].name}"
            for r in range(chosen.replicas)
        ]
        memory = chosen.memory[stage].total
        lines.append(f"  stage {stage}: {held} ({size} layers, {memory / 1e9:.1f} GB) on {', '.join(gpus)}")
        start = end
    return lines


def _left_out(plan: Plan, chosen: Candidate) -> str:
    used = set(chosen.gpus)
    idle = [
        gpu.name for b, node in enumerate(plan.inventory.nodes) for c, gpu in enumerate(node.gpus) if (b, c) not in used
    ]
    return _names(tuple(idle))


def _engine(row: Candidate) -> str:
    names = {
        "single": "a single card",
        "pipeline": f"a pipeline of {len(row.partition)} stages",
        "pipeline x data": f"{row.replicas} pipelines of {len(row.partition)} stages",
    }
    told = names.get(row.strategy, row.strategy.replace("zero-", "ZeRO-"))
    return told + row.name.removeprefix(row.strategy)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def _fullest(row: Candidate) -> tuple[float, int]:
    gpu = max(range(len(row.memory)), key=lambda i: row.memory[i].total / row.capacity[i])
    return row.memory[gpu].total, gpu


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return (
        f"[{','.join(map(str, value))}]"
        if isinstance(value, list)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
