# SPDX-License-Identifier: Apache-2.0
"""tools/data/prepare.py: LLaVA records to shards."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

PROGRAM = Path(__file__).resolve().parents[3] / "tools/data/prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("prepare_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # worker processes look its functions up there
    spec.loader.exec_module(module)
    return module


def talk(user: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]


def picture(colour: str = "red") -> bytes:
    Image.new("RGB", (9, 9), colour).save(stream := io.BytesIO(), format="PNG")
    return stream.getvalue()


GOOD = [
    {"id": "one", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "A.")},
    {"id": "two", "image": ["b.PNG", "sub/c.jpg"], "conversations": talk("<image> or <image>?", "The second.")},
    {"id": "none", "conversations": talk("Hi", "Hi.")},
    {"id": "text", "text": "Plain text."},
]
BAD = {
    "missing_image": {"image": "gone.png", "conversations": talk("<image>?", "No.")},
    "image_count_mismatch": {"image": "a.png", "conversations": talk("What?", "No.")},
    "bad_image": {"image": "damaged.png", "conversations": talk("<image>?", "No.")},
    "role_order": {"conversations": talk("a", "b")[::-1]},
    "image_token_in_text": {"text": "<IMG_CONTEXT>"},
    "empty_conversation": {"conversations": []},
    "bad_record": {"image": {"path": "a.png"}, "conversations": talk("<image>?", "No.")},
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.PNG", "green"), ("sub/c.jpg", "blue")):
        (root / name).write_bytes(picture(colour))
    (root / "damaged.png").write_bytes(picture()[:50])
    return root


def write(path: Path, records: list[Any]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records))
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_records_and_images_arrive_unchanged(name: str, prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    reports = prepare.prepare(out, [write(tmp_path / name, GOOD)], image_root=images, progress=False)
    assert (reports["train"].kept, reports["train"].images, reports["train"].rejected) == (4, 3, {})
    files = members(out / "train/shard-000000.tar")
    assert [json.loads(data) for key, data in files.items() if key.endswith(".json")] == GOOD
    assert files["train_000000000.0.png"] == picture("red")
    assert files["train_000000001.0.png"] == picture("green") and files["train_000000001.1.jpg"] == picture("blue")
    split = yaml.safe_load((out / ".nv-meta/split.yaml").read_text())["split_parts"]
    assert split == {"train": ["train/shard-000000.tar"]}


def test_unusable_records_are_left_out_counted_and_named(prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    records = GOOD + [{"id": reason, **record} for reason, record in BAD.items()]
    out = tmp_path / "out"
    reports = prepare.prepare(out, [write(tmp_path / "r.json", records)], image_root=images, progress=False)
    assert reports["train"].kept == 4 and reports["train"].rejected == dict.fromkeys(BAD, 1)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["id"], reject["reason"]) for reject in rejects] == [(reason, reason) for reason in BAD]
    assert rejects[0]["key"] == "train_000000004" and str(images / "gone.png") in rejects[0]["message"]
    table = prepare.format_report(reports).splitlines()
    assert table[0].split()[:5] == ["split", "kept", "images", "left", "out"] and "missing_image" in table[0]
    assert table[1].split()[:4] == ["train", "4", "3", "7"]


def test_a_line_that_is_no_json_is_left_out_alone(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    reports = prepare.prepare(tmp_path / "out", [tmp_path / "r.jsonl"], progress=False)
    assert reports["train"].kept == 2 and reports["train"].rejected == {"bad_record": 1}


def test_shards_do_not_depend_on_the_number_of_processes(prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    records = write(tmp_path / "r.json", (GOOD + list(BAD.values())) * 4)
    shards = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        options = {"image_root": images, "samples_per_shard": 5, "valid_fraction": 0.4, "progress": False}
        prepare.prepare(out, [records], workers=workers, **options)
        files = [*sorted(out.rglob("*.tar")), out / "rejects.jsonl", *sorted((out / ".nv-meta").glob("*.yaml"))]
        shards.append({path.relative_to(out): path.read_bytes() for path in files})
    assert shards[0] == shards[1] and len(shards[0]) > 6


def test_the_drawn_validation_share_is_disjoint_and_stays_when_records_are_added(
    prepare: ModuleType, tmp_path: Path
) -> None:
    texts = [{"text": f"Text {i}."} for i in range(200)]
    drawn = []
    for count in (100, 200):
        splits = prepare._read_splits([write(tmp_path / "r.json", texts[:count])], [], 0.2)
        assert {key for key, _ in splits["train"]}.isdisjoint(key for key, _ in splits["val"])
        assert len(splits["train"]) + len(splits["val"]) == count and 0.1 < len(splits["val"]) / count < 0.3
        drawn.append([record["text"] for _, record in splits["val"]])
    assert drawn[1][: len(drawn[0])] == drawn[0]


def test_shards_with_nothing_left_are_not_kept(prepare: ModuleType, tmp_path: Path) -> None:
    records = [BAD["role_order"]] * 3 + [GOOD[3]] * 3
    prepare.prepare(tmp_path / "out", [write(tmp_path / "r.json", records)], samples_per_shard=3, progress=False)
    assert [path.name for path in (tmp_path / "out/train").glob("*.tar")] == ["shard-000001.tar"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["/nowhere.json"]}, "/nowhere.json cannot be read"),
        ({"train": [__file__]}, "are neither a JSON list nor JSON lines"),
        ({"image_root": "/nowhere"}, "--image-root /nowhere is not a folder"),
        ({"valid_fraction": 1.0}, r"--valid-fraction 1.0 is not in \[0, 1\)"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0"),
        ({"workers": 0}, "--workers 0"),
        ({"output": __file__}, "is a file: give a folder"),
    ],
)
def test_wrong_arguments_name_the_flag_and_the_value(
    options: dict[str, Any], message: str, prepare: ModuleType, tmp_path: Path
) -> None:
    arguments = {"output": tmp_path / "out", "train": [write(tmp_path / "r.json", GOOD[3:])], "progress": False}
    with pytest.raises(ValueError, match=message):
        prepare.prepare(**(arguments | options))


def test_prepared_shards_are_replaced_only_when_asked(prepare: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.prepare(out, [write(tmp_path / "a.json", GOOD[3:])] * 2, samples_per_shard=1, progress=False)
    records = [write(tmp_path / "b.json", GOOD[2:3])]
    with pytest.raises(ValueError, match="holds prepared shards already"):
        prepare.prepare(out, records, progress=False)
    prepare.prepare(out, records, overwrite=True, progress=False)
    assert [path.name for path in (out / "train").glob("*.tar")] == ["shard-000000.tar"]


def test_nothing_usable_is_an_error(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No training record could be used"):
        prepare.prepare(tmp_path / "out", [write(tmp_path / "r.json", [BAD["role_order"]])], progress=False)


def test_the_program_prints_its_table_and_explains_mistakes(tmp_path: Path, images: Path) -> None:
    write(tmp_path / "r.json", [*GOOD, BAD["bad_image"]])
    command = [sys.executable, str(PROGRAM), "--train", "r.json", "--image-root", "images", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["train", "4", "3", "1", "1"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].endswith(
        "error: --output out holds prepared shards already: give another folder, or --overwrite."
    )
