# SPDX-License-Identifier: Apache-2.0
"""Keys of a record: no key with something to learn is dropped silently, and no empty key rejects a record."""

import math
import re
from typing import Any

import pytest

from megatron_smar.data.conversations import TEMPLATES, record_segments
from megatron_smar.data.fields import RECORD_KEYS, TURN_KEYS, check_keys, image_paths
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources.llava import convert

from .conftest import talk

EMPTY = [None, "", " ", [], {}, [""], [None], [[]], {"path": None}, math.nan]
MEANINGFUL = {
    "video": "a.mp4",
    "videos": ["a.mp4"],
    "audio": "a.wav",
    "audios": ["a.wav"],
    "speech": "a.flac",
    "tools": [{"name": "search"}],
    "functions": '[{"name": "search"}]',
    "function_call": {"name": "search"},
    "tool_calls": [{"id": "1"}],
    "image_path": "a.png",
    "image_paths": ["a.png"],
    "imagePath": "a.png",
    "image_url": "https://example.org/a",
    "Image": "a.png",
    "IMAGES": ["a.png"],
    "img": "a.png",
    "pictures": ["a.png"],
    "image_base64": "aGVsbG8=",
    "frames": ["1", "2"],
    "path": "a.png",
    "file_name": "sub/a.JPG",
    "system_prompt": "Be nice.",
    "messages": [{"role": "user", "content": "Hi"}],
    "rejected": {"from": "gpt", "value": "No"},
}


def text(record: dict[str, Any]) -> str:
    return "".join(segment.text for segment in record_segments(record, TEMPLATES["mistral"], 0))


@pytest.mark.parametrize("key", MEANINGFUL)
def test_a_record_with_content_under_an_unread_key_is_rejected(key: str) -> None:
    record = {"id": "1", key: MEANINGFUL[key], "conversations": talk("Hi", "Yes")}
    for read in (lambda: list(convert(record)), lambda: text(record)):
        with pytest.raises(SampleError, match=re.escape(f"unsupported_key: `{key}` is not read")):
            read()


@pytest.mark.parametrize("value", EMPTY, ids=repr)
def test_empty_columns_are_ignored(value: Any) -> None:
    columns = dict.fromkeys([*MEANINGFUL, "image", "images", "system", "text", "anything"], value)
    (record,) = convert(columns | {"conversations": talk("Hi", "Yes")})
    assert record.images == () and record.unread == ()
    assert text(record.data) == "[INST] Hi [/INST] Yes"
    (plain,) = convert({"text": "The sun.", "conversations": value, "image": value})
    assert text(plain.data) == "The sun."
    (picture,) = convert(columns | {"image": "a.png", "conversations": talk("<image>", "Yes")})
    assert [place.paths for place in picture.images] == [("a.png",)]


def test_images_is_read_as_image() -> None:
    for value in ("a.png", ["a.png"], ["a.png", "b.png"]):
        assert (
            image_paths({"images": value})
            == image_paths({"image": value})
            == [value] * isinstance(value, str) + (value if isinstance(value, list) else [])
        )
    assert image_paths({"image": "a.png", "images": ["a.png"]}) == ["a.png"]
    with pytest.raises(SampleError, match="`image` and `images` name different pictures"):
        image_paths({"image": "a.png", "images": ["b.png"]})


@pytest.mark.parametrize("value", [{"path": "a.png"}, 3, ["a.png", ""], ["a.png", None], [["a.png"]]])
@pytest.mark.parametrize("key", ["image", "images"])
def test_an_invalid_path_is_reported_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(SampleError, match=f"bad_record: `{key}` is neither a path nor a list of paths"):
        image_paths({key: value})


def test_metadata_keys_are_ignored_and_unknown_keys_are_reported() -> None:
    about = {"id": 1, "source": {"a": [1]}, "width": 3, "image_id": "7", "image_size": [3, 4], "num_images": 1}
    about |= {"has_video": False, "video_id": "x", "model": "", "url": "https://example.org/a.jpg", "video": 0}
    assert check_keys(about) == []
    unknown = {"objects": [1], "wordy": "x", "image_caption": "A cat.", "answer": "Yes", "number": 3}
    assert check_keys(about | unknown) == list(unknown)
    (record,) = convert(unknown | {"text": "Long.", "conversations": [talk("Hi", "Yes")[0] | {"mood": "good"}]})
    assert record.unread == (*unknown, "text", "turn.mood")
    # Another key repeats the name of the image that is read, so that nothing is lost.
    assert check_keys({"image": "a.png", "file_name": "a.png"}) == ["file_name"]


@pytest.mark.parametrize(("value", "is_refused"), [(0, True), (False, True), (0.5, True), (1, False), (True, False)])
@pytest.mark.parametrize("key", ["weight", "loss", "train"])
def test_a_turn_with_another_loss_weight_is_refused(key: str, value: Any, is_refused: bool) -> None:
    turns = talk("Hi", "Yes")
    turns[1][key] = value
    if is_refused:
        with pytest.raises(SampleError, match=rf"unsupported_key: `conversations\[2\].{key}` is not read"):
            text({"conversations": turns})
    else:
        assert text({"conversations": turns}) == "[INST] Hi [/INST] Yes"
        assert check_keys(turns[1], TURN_KEYS) == []


def test_an_image_in_a_turn_is_not_dropped_silently() -> None:
    turns = [talk("Hi", "Yes")[0] | {"image": "a.png"}, talk("Hi", "Yes")[1]]
    with pytest.raises(SampleError, match=r"unsupported_key: `conversations\[1\].image` is not read"):
        text({"conversations": turns})


def test_a_records_system_text_is_its_system_turn() -> None:
    turns = talk("Hi", "Yes")
    turn = {"from": "system", "value": "Be nice."}
    expected = record_segments({"conversations": [turn, *turns]}, TEMPLATES["vicuna_v1"], 0)
    for record in ({"conversations": turns}, {"conversations": [turn, *turns]}):
        assert record_segments(record | {"system": "Be nice."}, TEMPLATES["vicuna_v1"], 0) == expected
    assert expected != record_segments({"conversations": turns}, TEMPLATES["vicuna_v1"], 0)
    assert "system" in RECORD_KEYS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "x", "conversations": [{"from": "system", "value": "y"}, *talk("a", "b")]}, "different things"),
        ({"system": ["x"], "conversations": talk("a", "b")}, "`system` is not a text"),
        ({"system": "<image>", "conversations": talk("a", "b")}, "`system` has an <image> tag"),
        ({"system": "<IMG_CONTEXT>", "conversations": talk("a", "b")}, "`system` contains <IMG_CONTEXT>"),
        ({"system": "x", "text": "y"}, "`system` is given beside `text`"),
    ],
)
def test_system_text_that_cannot_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=re.escape(message)):
        text(changes)
