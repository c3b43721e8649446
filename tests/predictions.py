"""Predictions in one line, as an evaluation keeps them."""

from smolray.evaluate.metrics.exact_match import is_correct


def ten_answers(*counted):
    """Ten annotators: ten_answers(("yes", 3), ("no", 7))."""
    answers = [answer for answer, count in counted for _ in range(count)]
    assert len(answers) == 10
    return answers


def predicted(text, *answers, kind="", key="k", name="1"):
    """The prediction `text` for a question with these reference answers."""
    return {
        "id": name,
        "key": key,
        "type": kind,
        "question": "?",
        "prediction": text,
        "answer": answers[0],
        "answers": list(answers),
        "correct": is_correct(text, answers),
    }
