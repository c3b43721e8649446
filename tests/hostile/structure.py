"""Rows with wrong columns, types, turns and roles."""

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.case import Case, lines, some


def wrong_columns(rng, folder):
    names = rng.sample(["foo", "bar", "baz", "pixels", "target"], 2)
    pq.write_table(pa.table({n: ["x"] * 3 for n in names}), folder / "x.parquet")
    return Case(3, error=f"x.parquet: no known layout; columns found: {names[0]}, {names[1]}; expected messages")


def wrong_types(rng, folder):
    records = [
        {"question": ["a"], "answer": "a"},
        {"question": "q", "answer": {"x": 1}},
        {"image": 7, "question": "q", "answer": "a"},
        {"image": [["good.png"]], "question": "q", "answer": "a"},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "user", "content": {"x": 5}}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {"conversations": [{"from": "human"}]},
        {"chosen": "a", "rejected": {"x": 1}},
        {"prompt": 1, "completion": "x"},
        {"texts": [["a", "b"]]},
    ]
    bad = [*rng.sample(records, rng.randint(3, 9)), b"[1, 2]", b'"text"', b"null", b"3"]
    return Case(lines(rng, folder, bad), {"wrong_type": len(bad)})


def conversations_without_a_turn(rng, folder):
    user = {"role": "user", "content": "hi"}
    kinds = [
        {"messages": []},
        {"messages": [user]},
        {"conversations": []},
        {"texts": []},
        {"chosen": [user], "rejected": [user, user]},
    ]
    bad = some(rng, lambda: rng.choice(kinds), 6)
    return Case(lines(rng, folder, bad), {"no_turn": len(bad)})


def wrong_roles(rng, folder):
    def record():
        role = rng.choice(["tool", "", "observation", "narrator", None, 3])
        if rng.random() < 0.5:
            return {"messages": [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}]}
        return {"conversations": [{"from": role, "value": "x"}, {"from": "gpt", "value": "y"}]}

    bad = some(rng, record)
    return Case(lines(rng, folder, bad), {"wrong_role": len(bad)})
