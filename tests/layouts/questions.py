"""Data sets of questions and answers, with and without options."""

import base64

from tests.layouts.case import HERE, Layout, encoded, pic

ASKED, Q = f"{HERE}What is it?", "What is it?"
LETTERS = f"{HERE}Which?\nA. cat\nB. dog\nC. owl"
OPTIONS = ["cat", "dog", "owl"]


def vqa(n, answer="red", **more):
    return {"image": pic(n), "question": Q, "answer": answer} | more


QUESTIONS = [
    Layout(
        "VQAv2",
        lambda n: {
            **{"question_type": "what is", "multiple_choice_answer": "net", "image_id": n, "answer_type": "other"},
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in ("net", "net", "mesh")],
            **{"question_id": n, "question": Q, "image": pic(n)},
        },
        ASKED,
        "net",
    ),
    Layout(
        "OK-VQA",
        lambda n: vqa(n, question_id=str(n), answers=["race", "race", "run"], answer_type="other") | {"answer": None},
        ASKED,
        "race",
    ),
    Layout(
        "A-OKVQA",
        lambda n: {
            **{"image": pic(n), "question_id": f"q{n}", "question": "Which?", "choices": OPTIONS},
            **{"correct_choice_idx": 1, "direct_answers": "['dog', 'a dog']", "rationales": ["It barks."]},
            "difficult_direct_answer": False,
        },
        LETTERS,
        "B",
    ),
    Layout(
        "TextVQA",
        lambda n: {
            **{"image_id": f"{n}ab", "question_id": n, "question": Q, "question_tokens": ["what"], "image": pic(n)},
            **{"image_width": 6, "image_height": 4, "flickr_original_url": f"https://farm.example.org/{n}_o.jpg"},
            **{"answers": ["nokia"] * 9 + ["toshiba"], "image_classes": ["Phone"], "ocr_tokens": ["NOKIA"]},
        },
        ASKED,
        "nokia",
    ),
    Layout(
        "DocVQA",
        lambda n: {
            **{"questionId": str(n), "question": Q, "question_types": ["form"], "image": pic(n), "docId": n},
            **{"ucsf_document_id": "x", "ucsf_document_page_no": "1", "answers": ["$5", "5"], "data_split": "val"},
        },
        ASKED,
        "$5",
    ),
    Layout(
        "InfographicVQA",
        lambda n: (
            vqa(n, questionId=str(n), answers=["4"], image_url="http://example.org/1.jpg", ocr="{}") | {"answer": None}
        ),
        ASKED,
        "4",
    ),
    Layout(
        "ChartQA",
        lambda n: {"image": pic(n), "query": Q, "label": ["14"], "human_or_machine": 0},
        ASKED,
        "14",
    ),
    Layout(
        "GQA (instructions)",
        lambda n: {
            "id": str(n),
            "imageId": "n1",
            "question": Q,
            "answer": "yes",
            "fullAnswer": "Yes.",
            "isBalanced": True,
        },
        refused="column 'imageId' is not used, and is named like an image column",
    ),
    Layout(
        "VizWiz-VQA", lambda n: vqa(n, ["grass", "grass", "lawn"], question_id=f"{n}.jpg", category="x"), ASKED, "grass"
    ),
    Layout(
        "ST-VQA",
        lambda n: {
            "image": pic(n),
            "qas": [{"question": Q, "answers": ["x", "y"]}, {"question": "and?", "answers": ["z"]}],
        },
        ASKED,
        "x",
    ),
    Layout(
        "OCR-VQA",
        lambda n: {
            **{"image": pic(n), "image_id": f"{n}", "questions": [Q, "and?"], "answers": ["x", "z"]},
            **{"title": "T", "genre": "G"},
        },
        ASKED,
        "x",
    ),
    Layout(
        "CLEVR-Math",
        lambda n: {"template": "add", "id": str(n), "question": Q, "image": pic(n), "label": 3},
        ASKED,
        "3",
    ),
    Layout(
        "ScienceQA",
        lambda n: {
            **{"image": pic(n) if n != 1 else None, "question": "Which?", "choices": OPTIONS, "answer": 2},
            **{"hint": "A zoo.", "task": "closed choice", "grade": "grade2", "lecture": "…", "solution": "…"},
        },
        f"{HERE}A zoo.\nWhich?\nA. cat\nB. dog\nC. owl",
        "C",
        images=(1, 0, 1),
    ),
    Layout("AI2D", lambda n: {"question": "Which?", "options": OPTIONS, "answer": "2", "image": pic(n)}, LETTERS, "C"),
    Layout(
        "MMBench",
        lambda n: {
            **{"index": n, "question": "Which?", "hint": "A zoo.", "answer": "B", "A": "cat", "B": "dog", "C": "owl"},
            **{"D": "nan", "category": "x", "source": "x", "L2-category": "x", "comment": None, "image": pic(n)},
        },
        f"{HERE}A zoo.\nWhich?\nA. cat\nB. dog\nC. owl",
        "B",
    ),
    Layout(
        "MMBench (TSV, base64)",
        lambda n: {
            **{"index": n, "image": base64.b64encode(encoded(n)).decode(), "question": "Which?", "answer": "A"},
            **{"A": "cat", "B": "dog", "C": "owl", "hint": "nan"},
        },
        LETTERS,
        "A",
        lines=True,
    ),
    Layout(
        "SEED-Bench",
        lambda n: {
            **{
                "answer": "A",
                "choice_a": "cat",
                "choice_b": "dog",
                "choice_c": "owl",
                "data_id": "1",
                "image": [pic(n)],
            },
            **{"question": "Which?", "question_id": str(n), "question_type_id": 1, "segment": []},
        },
        LETTERS,
        "A",
    ),
    Layout(
        "MMMU",
        lambda n: {
            **{"id": f"v_{n}", "question": "Compare <image 2> with <image 1>.", "options": "['cat', 'dog']"},
            **{"explanation": "", "image_1": pic(n), "image_2": pic(n + 3), "image_3": None, "img_type": "['Photo']"},
            **{"answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice", "subfield": "x"},
        },
        f"Compare {HERE} with {HERE}.\nA. cat\nB. dog",
        "B",
        images=(2, 2, 2),
    ),
    Layout(
        "MMMU-Pro (vision)",
        lambda n: {"id": str(n), "image": pic(n), "options": "['cat', 'dog']", "answer": "A", "subject": "x"},
        refused="no known layout; columns found: id, image, options, answer, subject",
    ),
    Layout(
        "MMStar",
        lambda n: {
            **{"index": n, "question": "Which?\nOptions: A: cat, B: dog", "image": pic(n), "answer": "A"},
            **{"category": "x", "l2_category": "x", "meta_info": {"source": "x", "split": "val"}},
        },
        f"{HERE}Which?\nOptions: A: cat, B: dog",
        "A",
    ),
    Layout(
        "MathVista",
        lambda n: {
            **{"pid": str(n), "question": "Which?", "image": f"images/{n}.jpg", "decoded_image": pic(n)},
            **{
                "choices": OPTIONS if n != 1 else None,
                "unit": None,
                "precision": None,
                "answer": "dog" if n != 1 else "4",
            },
            **{"question_type": "multi_choice", "answer_type": "text", "query": "Hint: … Question: Which? …"},
        },
        LETTERS,
        "B",
    ),
    Layout(
        "MathVision",
        lambda n: {
            **{"id": str(n), "question": "How many?\n<image1>", "options": [], "image": f"images/{n}.jpg"},
            **{"decoded_image": pic(n), "answer": "7", "solution": None, "level": 2, "subject": "counting"},
        },
        f"How many?{HERE}",
        "7",
    ),
    Layout(
        "MathVerse",
        lambda n: vqa(n, "B", sample_index="1", problem_version="Text", query_wo="…", question_for_eval="…"),
        ASKED,
        "B",
    ),
    Layout(
        "HallusionBench",
        lambda n: {"question_id": str(n), "question": Q, "gt_answer": "1", "filename": "./1.png", "image": pic(n)},
        ASKED,
        "1",
        settings={"columns": {"answer": "gt_answer"}},
    ),
    Layout(
        "POPE", lambda n: vqa(n, "yes", id=str(n), question_id="1", image_source="COCO_val", category="x"), ASKED, "yes"
    ),
    Layout("MME", lambda n: vqa(n, "Yes", question_id="code/1.png", category="code_reasoning"), ASKED, "Yes"),
    Layout(
        "BLINK",
        lambda n: {
            **{"idx": f"v_{n}", "question": "Which?", "sub_task": "x", "image_1": pic(n), "image_2": pic(n + 3)},
            **{
                "image_3": None,
                "image_4": None,
                "choices": OPTIONS,
                "answer": "(C)",
                "prompt": "…",
                "explanation": "…",
            },
        },
        f"{HERE}{LETTERS}",
        "C",
        images=(2, 2, 2),
    ),
    Layout("RealWorldQA", lambda n: vqa(n, "B"), ASKED, "B"),
    Layout(
        "NLVR2",
        lambda n: {
            "question_id": str(n),
            "question": Q,
            "answer": "True",
            "left_image": pic(n),
            "right_image": pic(n + 3),
        },
        HERE + ASKED,
        "True",
        images=(2, 2, 2),
    ),
    Layout(
        "RefCOCO",
        lambda n: vqa(
            n, ["the dog", "dog left"], question_id=str(n), bbox=[1.5, 2.0], file_name="COCO_1.jpg", iscrowd=0
        ),
        ASKED,
        "the dog",
    ),
    Layout(
        "ScreenSpot",
        lambda n: {"file_name": "pc_1.png", "bbox": [0.1, 0.2, 0.3, 0.4], "instruction": "close it", "image": pic(n)},
        f"{HERE}close it",
        "[0.1, 0.2, 0.3, 0.4]",
        settings={"columns": {"answer": "bbox"}},
    ),
    Layout(
        "Visual Genome (qas)",
        lambda n: {
            "image": pic(n),
            "image_id": n,
            "url": "https://example.org/1.jpg",
            "qas": [{"qa_id": 7, "image_id": n, "question": Q, "answer": "x", "a_objects": []}],
        },
        ASKED,
        "x",
    ),
    Layout(
        "Visual Genome (question_answers.json)",
        lambda n: {"id": n, "qas": [{"qa_id": 7, "image_id": n, "question": Q, "answer": "x"}]},
        refused="the row has no image, and qas names one in 'image_id'",
        lines=True,
    ),
    Layout(
        "LRV-Instruction",
        lambda n: {"image_id": f"23{n}", "question": Q, "answer": "No.", "task": "x"},
        refused="column 'image_id' is not used, and is named like an image column",
        lines=True,
    ),
    Layout(
        "PixMo-AskModelAnything",
        lambda n: {
            "image_url": f"https://example.org/{n}.jpg",
            "image_sha256": "ab",
            "question": Q,
            "answer": "A cat.",
        },
        refused="URL",
        why="its images are URLs, which are not fetched",
    ),
    Layout(
        "SQuAD",
        lambda n: {
            **{"id": f"x{n}", "title": "T", "context": "It was 1920.", "question": "When?"},
            "answers": {"text": ["1920"], "answer_start": [7]},
        },
        "It was 1920.\nWhen?",
        "1920",
        images=(0, 0, 0),
    ),
    Layout(
        "SmolVLM2 video chat",
        lambda n: {"video": f"{n}.mp4", "question": Q, "answer": "A cat."},
        refused="column 'video' is not used, and holds video or audio, which is not supported",
        lines=True,
    ),
]
