# SPDX-License-Identifier: Apache-2.0
"""SVIT and LRV-Instruction, which name images of Visual Genome by number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_smar.data.fields import check_keys
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources import llava
from megatron_smar.data.sources.records import ImageFile, SourceRecord, talk

# Visual Genome has two parts; LLaVA keeps both below vg/.
_PARTS = ("vg/VG_100K", "vg/VG_100K_2", "VG_100K", "VG_100K_2")
# They enclose the region that a referring question refers to; SVIT's files in LLaVA's format do not have them.
_REFERENCE_MARKS = ("<st>", "<ed>")


def convert_svit(entry: Any) -> Iterator[SourceRecord]:
    """Yields the records of an entry of SVIT: one for each conversation about its image.

    Follows BAAI/SVIT (github.com/BAAI-DCAI/Visual-Instruction-Tuning): `data/conversation.json`,
    `complex_reasoning.json`, `detail_description.json` and `referring_qa.json`, lists of `{"image_id",
    "conversations": [{"content": [{"from": "user" | "gpt", "value"}, ...]}]}`; and `format/llava-v1.5`, e.g.
    `SVIT_core_150K.json`, the 157k records. As in the latter, the image precedes a conversation's first question, and
    reference marks are removed.

    Raises:
        SampleError: `bad_record` or `unsupported_key`.
    """
    if isinstance(entry, dict) and "image_id" not in entry:
        yield from llava.convert(entry)
        return
    conversations = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(conversations, list):
        raise SampleError("bad_record", "the entry is not a JSON object with `image_id` and a list `conversations`")
    image_id = entry["image_id"]
    unread = tuple(check_keys(entry, {"image_id", "conversations"}))
    for number, conversation in enumerate(conversations):
        turns = conversation.get("content") if isinstance(conversation, dict) else None
        values = [_plain(turn) for turn in turns] if isinstance(turns, list) else []
        data = {"id": f"{image_id}_{number}", "image": f"{image_id}.jpg", "conversations": _with_image(values)}
        yield SourceRecord(data, (_image(image_id),), unread=unread)


def convert_lrv(entry: Any) -> Iterator[SourceRecord]:
    """Yields the one record of an entry of LRV-Instruction.

    Follows github.com/FuxiaoLiu/LRV-Instruction: `filter_cap1.json`, `filter_cap_more1.json` (the 331k, without
    coordinates), `filter_cap.json`, `filter_cap_more.json` and the chart instructions: `{"image_id", "question",
    "answer", "task"}` in a list, which MiniGPT-4 expects as `annotations` of an object. Images are `image/ID.jpg`,
    as in the authors' archive, or Visual Genome's; the id of a chart is its file name.

    Raises:
        SampleError: `bad_record` or `unsupported_key`.
    """
    if not isinstance(entry, dict) or "image_id" not in entry:
        raise SampleError("bad_record", "the entry is not a JSON object with `image_id`, `question` and `answer`")
    image = _image(entry["image_id"], "", "image", "chart_image")
    texts = (entry.get("question"), entry.get("answer"))
    question, answer = (text.strip() if isinstance(text, str) else text for text in texts)
    data = {"id": str(entry["image_id"]), "image": image.paths[0], "conversations": talk([(question, answer)], 1)}
    unread = check_keys(entry, {"image_id", "question", "answer", "task"})
    yield SourceRecord(data, (image,), unread=tuple(unread))


def _image(image_id: Any, *folders: str) -> ImageFile:
    """Returns the possible paths of the image with a number or file name."""
    if isinstance(image_id, bool) or not isinstance(image_id, int | str) or image_id == "":
        raise SampleError("bad_record", f"`image_id` {image_id!r} is neither a number nor a name")
    name = str(image_id) if str(image_id).lower().endswith((".jpg", ".jpeg", ".png")) else f"{image_id}.jpg"
    return ImageFile(tuple(f"{folder}/{name}" if folder else name for folder in (*folders, *_PARTS)))


def _plain(turn: Any) -> Any:
    """Returns a turn without reference marks."""
    if not isinstance(turn, dict) or not isinstance(text := turn.get("value"), str):
        return turn
    for mark in _REFERENCE_MARKS:
        text = text.replace(mark, "")
    return turn | {"value": text}


def _with_image(turns: list[Any]) -> list[Any]:
    """Puts the image tag before the text of the first turn; the turn's role is checked later."""
    if turns and isinstance(turns[0], dict) and isinstance(turns[0].get("value"), str):
        return [turns[0] | {"value": f"<image>\n{turns[0]['value']}"}, *turns[1:]]
    return turns
