# SPDX-License-Identifier: Apache-2.0
"""Readers of published datasets, on records in their published format (tests/fixtures/data)."""

import base64
import io
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.data.conversations import TEMPLATES, record_segments
from megatron_smar.data.images import read_image, read_size
from megatron_smar.data.sources import FORMATS, Base64Images, ImageFile, SourceRecord, Unreadable, read_source

DATA = Path(__file__).resolve().parents[3] / "fixtures/data"
PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": "llava",
    "llava_v1_5_mix665k.json": "llava",
    "lvis_instruct4v_220k.json": "lvis_instruct",
    "SVIT/data/conversation.json": "svit",
    "SVIT/data/complex_reasoning.json": "svit",
    "SVIT/data/detail_description.json": "svit",
    "SVIT/data/referring_qa.json": "svit",
    "SVIT/format/llava-v1.5/SVIT_core_150K.json": "svit",
    "filter_cap1.json": "lrv",
    "filter_cap_more1.json": "lrv",
    "chart_release_update.json": "lrv",
    "LA/LACONV_instructions.json": "mimic_it",
}


def read(name: str) -> list[SourceRecord]:
    images = Base64Images([DATA / "LA/LA.json"]) if PUBLISHED[name] == "mimic_it" else None
    with (DATA / name).open("rb") as file:
        return list(read_source(file, PUBLISHED[name], images))


def read_bytes(content: Any, name: str, images: Base64Images | None = None) -> list[SourceRecord | Unreadable]:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return list(read_source(io.BytesIO(content), name, images))


def texts(record: SourceRecord) -> list[str]:
    return [turn["value"] for turn in record.data["conversations"]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_record_can_be_trained_on(name: str) -> None:
    records = read(name)
    assert records and {*PUBLISHED.values()} == {*FORMATS}
    for record in records:
        record_segments(record.data, TEMPLATES["mistral"], len(record.images))
        for image in record.images:
            if isinstance(image, ImageFile):
                paths = [DATA / "images" / path for path in image.paths]
                read_image(next(path for path in paths if path.exists()).read_bytes())
            else:
                data = Path(image.file).read_bytes()[image.offset : image.offset + image.length]
                read_image(base64.b64decode(data))
                assert read_size(base64.b64decode(data)) == (224, 224)


def test_llava_records_are_unchanged_except_for_turns_without_question_or_answer() -> None:
    published = json.loads((DATA / "llava_v1_5_mix665k.json").read_text())
    *complete, trimmed = read("llava_v1_5_mix665k.json")
    assert [record.data for record in complete] == published[:-1]
    assert trimmed.trimmed == 2 and texts(trimmed) == ["Thanks. And now?", "Now a square."]
    assert [bool(record.images) for record in [*complete, trimmed]] == [True] * 5 + [False] * 2


def test_a_video_is_skipped_with_its_reason() -> None:
    (record,) = read_bytes([{"id": "v", "video": "a.mp4", "conversations": []}], "llava")
    assert isinstance(record, Unreadable) and record.reason == "unsupported_key"


def test_a_trimmed_turn_with_an_image_rejects_the_record() -> None:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(["Hi", "Yes", "<image> And?"])]
    unasked_turns = [turns[1] | {"value": "See <image>"}, *turns[:2]]
    loose = [{"image": "a.png", "conversations": some} for some in (turns, unasked_turns)]
    unanswered, unasked = read_bytes(loose, "llava")
    assert isinstance(unanswered, Unreadable) and unanswered.reason == "image_without_answer"
    assert unanswered.message == "the last question, which has no answer to learn, shows 1 image"
    assert isinstance(unasked, Unreadable) and unasked.reason == "image_in_answer"


@pytest.mark.parametrize("name", ["svit", "lrv", "mimic_it"])
def test_unread_keys_are_refused_or_reported_in_every_format(name: str) -> None:
    good = [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]
    entry = {
        "svit": {"image_id": 1, "conversations": [{"content": good}]},
        "lrv": {"image_id": 1, "question": "a", "answer": "b"},
        "mimic_it": {"instruction": "a", "answer": "b", "image_ids": []},
    }[name]
    for changes, expected in (({"video": "a.mp4"}, "unsupported_key"), ({"mood": "good"}, ("mood",))):
        changed = entry | changes
        content = {"data": {"x": changed}} if name == "mimic_it" else [changed]
        (record,) = read_bytes(content, name, Base64Images([DATA / "LA/LA.json"]))
        assert expected == (record.reason if isinstance(record, Unreadable) else record.unread)


def test_lvis_images_are_found_below_a_coco_folder_too() -> None:
    (record,) = read("lvis_instruct4v_220k.json")
    assert record.images == (ImageFile(("coco/train2017/000000119423.jpg", "train2017/000000119423.jpg")),)


def test_each_conversation_of_an_svit_image_is_a_record_that_starts_with_the_image() -> None:
    first, second, third = read("SVIT/data/conversation.json")
    assert [record.data["id"] for record in (first, second, third)] == ["2317468_0", "2317468_1", "2_0"]
    assert texts(first) == ["<image>\nWhat is below?", "A square.", "And above?", "A disc."]
    assert first.images == second.images and "VG_100K/2317468.jpg" in first.images[0].paths
    assert "vg/VG_100K_2/2.jpg" in third.images[0].paths
    (referring,) = read("SVIT/data/referring_qa.json")
    assert texts(referring) == ["<image>\nWhere is the disc?", "The disc [0.1, 0.2, 0.3, 0.4] is on the left."]


def test_a_broken_svit_conversation_does_not_affect_the_others_of_its_image() -> None:
    good = {"content": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]}
    records = read_bytes([{"image_id": 1, "conversations": [good, {"content": None}, {}, good]}], "svit")
    assert [len(record.data["conversations"]) for record in records] == [2, 0, 0, 2]
    (record,) = read_bytes([{"image_id": None, "conversations": [good]}], "svit")
    assert isinstance(record, Unreadable) and record.reason == "bad_record"


def test_an_lrv_record_names_its_image_by_number_or_file_name() -> None:
    record = read("filter_cap1.json")[0]
    assert texts(record) == ["<image>\nCan you see a teapot?", "There is no teapot."]
    assert record.images[0].paths[:2] == ("2392588.jpg", "image/2392588.jpg")
    assert read("chart_release_update.json")[0].images[0].paths[0] == "13.png"


def test_lrv_in_minigpt4s_form_reads_the_same() -> None:
    entries = json.loads((DATA / "filter_cap1.json").read_text())
    assert read_bytes({"annotations": entries}, "lrv") == read("filter_cap1.json")


def test_each_mimic_it_instruction_is_a_record_without_its_examples() -> None:
    records = read("LA/LACONV_instructions.json")
    assert [texts(record) for record in records] == [
        ["<image>\nWhat is round?", "The disc."],
        ["<image>\nWhat is square?", "The square.\nNothing else."],
        ["<image>\nBar?", "Yes."],
    ]
    assert records[0].data["id"] == "LACONV_00_INS_000000033471_0"
    assert len({record.images for record in records}) == 1


def test_a_mimic_it_instruction_without_its_image_is_skipped_with_its_reason() -> None:
    images = Base64Images([DATA / "LA/LA.json"])
    data = {"x": {"instruction": "a", "answer": "b", "image_ids": ["LA_IMG_1"]}, "y": 3}
    missing, broken = read_bytes({"meta": {}, "data": data}, "mimic_it", images)
    assert isinstance(missing, Unreadable) and missing.reason == "missing_image" and "LA_IMG_1" in missing.message
    assert isinstance(broken, Unreadable) and broken.reason == "bad_record" and broken.data["id"] == "y"
    text = {"data": {"t": {"instruction": "a", "answer": "b", "image_ids": []}}}
    assert read_bytes(text, "mimic_it", images)[0].images == ()


ids = st.text(min_size=1, max_size=8).map(lambda name: f"i{name}")
strings = st.text(string.ascii_letters + string.digits + "+/-_=", max_size=40)


@given(st.dictionaries(ids, strings, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_images_are_found_where_a_json_parser_finds_them(
    tmp_path_factory: pytest.TempPathFactory,
    content: dict[str, str],
    indent: int | None,
    ascii_only: bool,
    listed: bool,
) -> None:
    path = tmp_path_factory.mktemp("images") / "LA.json"
    written = {name: [value] for name, value in content.items()} if listed else content
    path.write_text(
        json.dumps(written, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass"
    )
    images, data = Base64Images([path]), path.read_bytes()
    assert len(images) == len(content)
    for name, value in content.items():
        place = images.find(name)
        assert place is not None and data[place.offset : place.offset + place.length] == value.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"a": 1}',
        b'{"a": "b"',
        b'{"a": "b" "c": "d"}',
        b'{"a": "b\\"',
        b'{"a": ["b", "c"]}',
        b'{"a": "b",}',
    ],
)
def test_a_file_without_images_by_id_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "LA.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--image-files .*LA.json (is not|cannot be read)"):
        Base64Images([tmp_path / "LA.json"])


def test_parquet_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"--image-files LA.parquet is Parquet: write it as JSON"):
        Base64Images(["LA.parquet"])


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b'{"meta": {}}', "mimic_it", "with an object `data`|object `data` that has entries"),
        (b"[1", "mimic_it", "is not a JSON object with an object `data`"),
        (b'{"a":\n 1}', "llava", "neither a JSON list nor JSON lines"),
        (b'{"annotations": [1', "lrv", "not a JSON object with `annotations`"),
    ],
)
def test_a_file_in_another_format_is_refused(content: bytes, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "LA.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        read_bytes(content, name, Base64Images([tmp_path / "LA.json"]))


def test_entries_are_read_one_at_a_time_from_a_list_as_from_lines() -> None:
    entries = [{"id": i, "x": 0.5, "text": "é\U0001f600"} for i in range(5)]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    marked = b"\xef\xbb\xbf\n" + json.dumps(entries, ensure_ascii=False).encode()
    for content in (lines.encode(), marked):
        assert [record.data for record in read_bytes(content, "llava")] == entries
    endless = io.BytesIO(json.dumps(entries).encode()[:-1] + b"," * 1)
    assert next(read_source(endless, "llava")).data == entries[0], "the first entry waited for the end of the file"
