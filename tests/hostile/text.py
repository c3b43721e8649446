"""Text that is not Unicode, is too long or empty, or looks like something else."""

from smolray.data.formats import turns
from tests.hostile.case import Case, good, lines, mixed, some


def unicode_text(rng, folder):
    texts = [
        "日本語の質問",
        "שאלה\u200f",
        "👩‍👩‍👧‍👦 e\u0301 ﬁ",
        "\u2028line\u2029",
        "𝒳" * rng.randint(1, 9),
        "\ufeffbom",
        "تاريخ",
    ]
    rng.shuffle(texts)
    return Case(mixed(rng, folder, [good(rng, question=t, answer=t) for t in texts]), texts=texts)


def special_tokens_in_text(rng, folder):
    tokens = [
        "<image>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<|im_start|>",
        "<global-img>",
        "<row_1_col_1>",
        "</s>",
    ]
    texts = ["what is " + "".join(rng.sample(tokens, 3)) for _ in range(4)]
    return Case(mixed(rng, folder, [good(rng, question=t, answer=t) for t in texts]), texts=texts)


def nul_bytes(rng, folder):
    texts = [f"a\0b{n}\0" for n in range(rng.randint(1, 4))]
    bad = some(rng, lambda: {"image": "good\0.png", "question": "q", "answer": "a"})
    return Case(
        lines(rng, folder, [{"question": t, "answer": t} for t in texts] + bad), {"missing_file": len(bad)}, texts=texts
    )


def enormous_text(rng, folder):
    text = "word " * rng.randint(100_000, 300_000)
    bad = [good(rng, question="x" * (turns.MAX_TEXT + 1))] if rng.random() < 0.3 else []
    return Case(mixed(rng, folder, [good(rng, question=text), *bad]), {"text_too_long": 1} if bad else {}, texts=[text])


def text_that_is_not_unicode(rng, folder):
    kinds = [
        b'{"question": "\\ud800", "answer": "a"}',
        b'{"question": "\xff\xfe", "answer": "a"}',
        b'{"question": "q", "answer": "x\\udfff"}',
    ]
    bad = some(rng, lambda: rng.choice(kinds))
    return Case(lines(rng, folder, bad), {"bad_text": len(bad)})


def empty_answers(rng, folder):
    bad = some(rng, lambda: good(rng, answer=rng.choice(["", " ", "\n\t "])))
    return Case(mixed(rng, folder, bad), {"empty_answer": len(bad)})


def mixed_text_only_rows(rng, folder):
    texts = [f"no image {rng.random()}" for _ in range(rng.randint(1, 9))]
    return Case(mixed(rng, folder, [good(rng, image=None, question=t) for t in texts]), texts=texts)
