# SPDX-License-Identifier: Apache-2.0
"""Held-out records: everything that prepare reads is read, and an unusable record is one sentence with its place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_smar.data.held_out import read_questions, read_texts

from .conftest import picture

LINES = "a\u2028b\x85c"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("is_list", [True, False])
def test_lists_lines_byte_order_marks_and_line_separators_are_read(is_list: bool, mark: bytes, tmp_path: Path) -> None:
    texts = [{"text": LINES}, {"id": 2**64, "text": "Plain."}, {"conversations": None, "text": "x", "video": []}]
    questions: list[dict[str, Any]] = [
        {"id": "1", "image": "red.png", "question": f"<image>\n{LINES}", "answer": "Red.", "kind": 3},
        {"images": ["red.png"] * 2, "question": "<image><image>?", "answer": "Both."},
        {"image": "", "question": "What?", "answer": "That."},
    ]
    (tmp_path / "red.png").write_bytes(picture())

    def write(name: str, records: list[dict[str, Any]]) -> Path:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        text = f"[{', '.join(lines)}]" if is_list else "\n".join(lines)
        (tmp_path / name).write_bytes(mark + text.encode())
        return tmp_path / name

    assert read_texts(write("text", texts)) == texts
    read = read_questions(write("vqa", questions), tmp_path)
    assert [item["image"] for item in read] == [["red.png"], ["red.png"] * 2, []]
    assert [item["question"] for item in read] == [item["question"] for item in questions]
    assert [item.get("kind") for item in read] == ["3", None, None]


BAD: dict[str, tuple[str, Any, str]] = {
    "missing picture": ("vqa", {"image": "gone.png", "question": "<image>", "answer": "A"}, "gone.png is not there"),
    "second of two": (
        "vqa",
        {"image": ["red.png", "bad.png"], "question": "<image><image>", "answer": "A"},
        "image 2 of 2: {root}/bad.png: an image cannot be decoded",
    ),
    "no tag": ("vqa", {"image": "red.png", "question": "What?", "answer": "A"}, "0 <image> tags but 1 image:"),
    "no question": ("vqa", {"image": "red.png", "answer": "A"}, "not a JSON object with `question` and `answer`"),
    "no text": ("vqa", {"question": 3, "answer": "A"}, "`question` is not a text"),
    "another key": ("vqa", {"video": "a.mp4", "question": "What?", "answer": "A"}, "`video` is not read"),
    "picture in text": ("text", {"image": "red.png", "text": "<image>"}, "it has 1 image, but --text is for text only"),
    "empty text": ("text", {"text": ""}, "`text` is not text, or is empty"),
    "number": ("text", 3, "the record is not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_record_is_named(name: str, tmp_path: Path) -> None:
    kind, record, message = BAD[name]
    (tmp_path / "red.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(picture()[:50])
    good = {"text": "a"} if kind == "text" else {"question": "a", "answer": "b"}
    record = {"id": "x", **record} if isinstance(record, dict) else record
    path = tmp_path / "records.json"
    path.write_text(json.dumps([good, record]))
    named = " (id x)" if isinstance(record, dict) else ""
    expected = re.escape(f"--{kind} {path}: record 2{named}: ") + ".*" + re.escape(message.format(root=tmp_path))
    with pytest.raises(ValueError, match=expected) as error:
        read_texts(path) if kind == "text" else read_questions(path, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)."),
        (b"", "cannot be read: it is empty."),
        (b"[]", "cannot be read: it is an empty list."),
        (b"[1", "record 1: the record is not a JSON object"),
        (b'[{"text": "a"}, {"text": ', "cannot be read: it is not a JSON list (record 2, line 1, column 26: "),
        (b'{"text": "a"}\n{"text": "\xff"}', "record 2: line 2 is not UTF-8 (byte 0xff at 10)."),
        (b'{"text": "a"}\n{"text"}', "record 2: line 2 is not JSON (Expecting ':' delimiter at column 8)."),
    ],
)
def test_a_broken_file_is_reported_in_one_sentence(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_texts(path)
    assert str(error.value).startswith(f"--text {path}") and "\n" not in str(error.value)
