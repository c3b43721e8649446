"""Data sets of conversations, captions, classes and preferences."""

import json

from tests.layouts.case import HERE, Layout, pic

Q, ASKED = "What is it?", f"{HERE}What is it?"
USER, GOOD = {"role": "user", "content": f"<image>{Q}"}, {"role": "assistant", "content": "A cat."}
TEXT = [{"role": "user", "content": Q}, GOOD]
LLAVA = [{"from": "human", "value": f"<image>\n{Q}"}, {"from": "gpt", "value": "A cat."}]


def part(kind, **more):
    return {"type": kind, "text": None} | more


CHATS = [
    Layout(
        "LLaVA-Instruct-150K",
        lambda n: {"id": str(n), "image": f"{n}.png", "conversations": LLAVA},
        ASKED,
        "A cat.",
        lines=True,
    ),
    Layout(
        "LLaVA-1.5 mix665k",
        lambda n: (
            {"id": str(n), "image": f"{n}.png", "conversations": LLAVA}
            if n != 1
            else {"id": "1", "model": "", "conversations": [{"from": "human", "value": Q}, LLAVA[1]]}
        ),
        ASKED,
        "A cat.",
        images=(1, 0, 1),
        lines=True,
    ),
    Layout(
        "ShareGPT4V", lambda n: {"id": str(n), "image": f"{n}.png", "conversations": LLAVA}, ASKED, "A cat.", lines=True
    ),
    Layout(
        "ALLaVA-4V",
        lambda n: {"id": str(n), "image": f"{n}.png", "conversations": LLAVA, "url": f"http://example.org/{n}.jpg"},
        ASKED,
        "A cat.",
        lines=True,
    ),
    Layout(
        "LLaVA-OneVision-Data",
        lambda n: {"id": str(n), "image": pic(n), "conversations": LLAVA, "data_source": "x"},
        ASKED,
        "A cat.",
    ),
    Layout(
        "llava-instruct-mix-vsft",
        lambda n: {
            "messages": [
                {"role": "user", "content": [part("text", text=Q, index=None), part("image", index=0)]},
                {"role": "assistant", "content": [part("text", text="A cat.", index=None)]},
            ],
            "images": [pic(n)],
        },
        f"{Q}{HERE}",
        "A cat.",
    ),
    Layout(
        "The Cauldron",
        lambda n: {"images": [pic(n)], "texts": [{"user": Q, "assistant": "A cat.", "source": "x"}]},
        ASKED,
        "A cat.",
    ),
    Layout(
        "Docmatix",
        lambda n: {"images": [pic(n), pic(n + 3)], "texts": [{"user": Q, "assistant": "A cat.", "source": "PDF"}]},
        HERE + ASKED,
        "A cat.",
        images=(2, 2, 2),
    ),
    Layout(
        "FineVision",
        lambda n: {
            **{"images": [pic(n)], "texts": [{"user": Q, "assistant": "A cat."}], "source": "x"},
            **{"relevance_ratings": [5], "relevance_min": 5, "formatting_ratings": [4], "image_correspondence_min": 3},
        },
        ASKED,
        "A cat.",
    ),
    Layout(
        "LLaMA-Factory (messages)",
        lambda n: {"messages": [USER, GOOD], "images": [f"{n}.png"]},
        ASKED,
        "A cat.",
        lines=True,
    ),
    Layout(
        "LLaMA-Factory (sharegpt)",
        lambda n: {"conversations": LLAVA, "system": "Be brief.", "tools": "", "images": [f"{n}.png"]},
        f"Be brief. | {ASKED}",
        "A cat.",
        lines=True,
    ),
    Layout(
        "Alpaca with images",
        lambda n: {
            **{"instruction": "<image>Name it", "input": "in Latin", "output": "felis", "images": [f"{n}.png"]},
            "history": [["Hi", "Hello"]],
        },
        f"Hi | Hello | {HERE}Name it\nin Latin",
        "felis",
        lines=True,
    ),
    Layout(
        "ms-swift",
        lambda n: {"messages": [USER, GOOD], "images": [f"{n}.png"], "system": "Be brief."},
        f"Be brief. | {ASKED}",
        "A cat.",
        lines=True,
    ),
    Layout(
        "ms-swift (query, response)",
        lambda n: {"query": f"<image>{Q}", "response": "A cat.", "history": [], "images": [f"{n}.png"]},
        ASKED,
        "A cat.",
        lines=True,
    ),
    Layout(
        "Qwen-VL",
        lambda n: {
            "id": str(n),
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>{n}.png</img>\n{Q}"},
                {"from": "assistant", "value": "A cat."},
            ],
        },
        f"Picture 1: {HERE}\n{Q}",
        "A cat.",
        lines=True,
    ),
    Layout(
        "Qwen2-VL messages",
        lambda n: {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": f"{n}.png"}, {"type": "text", "text": Q}]},
                GOOD,
            ]
        },
        ASKED,
        "A cat.",
        lines=True,
    ),
    Layout(
        "M3IT",
        lambda n: {"instruction": "Describe.", "inputs": Q, "image_base64_str": ["aaaa"], "outputs": "A cat."},
        refused="no known layout",
        lines=True,
    ),
    Layout(
        "COCO (Karpathy, sentences)",
        lambda n: {
            **{"image": pic(n), "filepath": "COCO_1.jpg", "sentids": [n], "filename": "COCO_1.jpg", "imgid": n},
            **{"split": "train", "cocoid": n, "sentences": {"raw": "A cat.", "tokens": ["a", "cat"], "sentid": n}},
        },
        f"{HERE}Describe the image.",
        "A cat.",
    ),
    Layout(
        "COCO-Caption (question)",
        lambda n: {
            "question_id": f"{n}.jpg",
            "image": pic(n),
            "question": "Describe it.",
            "answer": ["A cat.", "A pet."],
            "file_name": "1.jpg",
        },
        f"{HERE}Describe it.",
        "A cat.",
    ),
    Layout(
        "Flickr30k",
        lambda n: {
            "image": pic(n),
            "caption": ["A cat.", "A pet."],
            "sentids": ["1", "2"],
            "split": "train",
            "img_id": str(n),
            "filename": "1.jpg",
        },
        f"{HERE}Describe the image.",
        "A cat.",
    ),
    Layout(
        "TextCaps",
        lambda n: {
            **{"question_id": str(n), "question": "Describe it.", "image": pic(n), "image_id": "x", "image_width": 6},
            **{
                "flickr_original_url": "https://example.org/1.jpg",
                "caption_str": ["A cat."],
                "reference_strs": ["A cat."],
            },
        },
        f"{HERE}Describe it.",
        "A cat.",
        settings={"columns": {"answer": "caption_str"}},
    ),
    Layout(
        "NoCaps",
        lambda n: {
            "image": pic(n),
            "image_coco_url": "https://example.org/1.jpg",
            "image_file_name": "1.jpg",
            "annotations_captions": ["A cat."],
        },
        f"{HERE}Describe the image.",
        "A cat.",
        settings={"columns": {"answer": "annotations_captions"}},
    ),
    Layout(
        "DOCCI",
        lambda n: {"image": pic(n), "example_id": f"train_{n}", "description": "A cat."},
        f"{HERE}Describe the image.",
        "A cat.",
    ),
    Layout(
        "Conceptual Captions",
        lambda n: {"image_url": f"https://example.org/{n}.jpg", "caption": "a cat"},
        refused="URL",
        why="its images are URLs, which are not fetched",
    ),
    Layout(
        "WebSight",
        lambda n: {"image": pic(n), "text": "<html></html>", "llm_generated_idea": "x"},
        f"{HERE}Describe the image.",
        "<html></html>",
    ),
    Layout("IAM lines", lambda n: {"image": pic(n), "text": "A cat."}, f"{HERE}Describe the image.", "A cat."),
    Layout(
        "CORD (Donut)",
        lambda n: {"image": pic(n), "ground_truth": json.dumps({"gt_parse": {"total": "5"}})},
        f"{HERE}Describe the image.",
        '{"gt_parse": {"total": "5"}}',
        settings={"columns": {"answer": "ground_truth"}},
    ),
    Layout(
        "LaTeX formulas",
        lambda n: {"image": pic(n), "latex_formula": "x"},
        refused="no known layout; columns found: image, latex_formula",
    ),
    Layout("CIFAR-10", lambda n: {"img": pic(n), "label": n}, f"{HERE}What is in the image?", "0"),
    Layout("Food-101", lambda n: {"image": pic(n), "label": n}, f"{HERE}What is in the image?", "0"),
    Layout(
        "Winoground",
        lambda n: {"id": n, "image_0": pic(n), "image_1": pic(n + 3), "caption_0": "a", "caption_1": "b", "tag": "x"},
        refused="no known layout",
    ),
    Layout(
        "MagicBrush",
        lambda n: {
            "img_id": "1",
            "turn_index": 1,
            "source_img": pic(n),
            "mask_img": pic(n + 3),
            "instruction": "add it",
            "target_img": pic(n + 6),
        },
        refused="no known layout",
    ),
    Layout(
        "RLAIF-V",
        lambda n: {
            "ds_name": "x",
            "image": pic(n),
            "question": Q,
            "chosen": "A cat.",
            "rejected": "A dog.",
            "idx": n,
            "image_path": "x/1.jpg",
        },
        ASKED,
        "A cat. | A dog.",
    ),
    Layout(
        "RLHF-V",
        lambda n: {
            "ds_name": "x",
            "image": pic(n),
            "text": json.dumps({"question": Q, "chosen": "A cat.", "rejected": "A dog."}),
            "idx": n,
            "image_path": "1.jpg",
        },
        ASKED,
        "A cat. | A dog.",
    ),
    Layout(
        "rlaif-v_formatted (TRL)",
        lambda n: {
            "images": [pic(n)],
            "prompt": [{"role": "user", "content": [part("image"), part("text", text=Q)]}],
            "chosen": [{"role": "assistant", "content": [part("text", text="A cat.")]}],
            "rejected": [{"role": "assistant", "content": [part("text", text="A dog.")]}],
        },
        ASKED,
        "A cat. | A dog.",
    ),
    Layout(
        "ms-swift DPO",
        lambda n: {"messages": [USER, GOOD], "rejected_response": "A dog.", "images": [f"{n}.png"]},
        ASKED,
        "A cat. | A dog.",
        lines=True,
    ),
    Layout(
        "LLaMA-Factory DPO",
        lambda n: {
            "conversations": LLAVA[:1],
            "chosen": LLAVA[1],
            "rejected": {"from": "gpt", "value": "A dog."},
            "images": [f"{n}.png"],
        },
        ASKED,
        "A cat. | A dog.",
        lines=True,
    ),
    Layout(
        "ultrafeedback_binarized",
        lambda n: {
            "prompt": Q,
            "prompt_id": str(n),
            "chosen": TEXT,
            "rejected": [TEXT[0], GOOD | {"content": "A dog."}],
            "messages": TEXT,
            "score_chosen": 9.0,
        },
        Q,
        "A cat. | A dog.",
        images=(0, 0, 0),
    ),
    Layout(
        "KTO",
        lambda n: {"prompt": Q, "completion": "A cat.", "label": n > 0},
        refused="column 'label' is not used, and says whether the answer is good",
        lines=True,
    ),
    Layout(
        "VLFeedback",
        lambda n: {
            "id": str(n),
            "prompt": Q,
            "image": pic(n),
            "models": ["m"],
            "completions": [{"model": "m", "response": "x"}],
        },
        refused="no known layout",
    ),
]
