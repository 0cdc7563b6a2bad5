# SPDX-License-Identifier: Apache-2.0
"""tools/data/prepare.py: LLaVA records to shards."""

import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
from megatron.energon.metadataset.loader import load_dataset
from PIL import Image

import megatron_smar.data.preparation
from megatron_smar.commands.prepare import main
from megatron_smar.data.sources.report import format_report

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "tools/data/prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    """The program as a module."""
    return megatron_smar.data.preparation


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
    "unsupported_key": {"image_path": "a.png", "conversations": talk("What?", "No.")},
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
    files = members(out / "train/image-000000.tar") | members(out / "train/text-000000.tar")
    assert [json.loads(data) for key, data in files.items() if key.endswith(".json")] == GOOD
    assert files["train_000000000.0.png"] == picture("red")
    assert files["train_000000001.0.png"] == picture("green") and files["train_000000001.1.jpg"] == picture("blue")
    split = yaml.safe_load((out / ".nv-meta/split.yaml").read_text())["split_parts"]
    assert split == {
        "train": ["train/image-000000.tar", "train/text-000000.tar"],
        "train_image": ["train/image-000000.tar"],
        "train_text": ["train/text-000000.tar"],
    }
    assert not (out / ".prepare").exists()


def test_unusable_records_are_skipped_counted_and_listed(prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    records = GOOD + [{"id": reason, **record} for reason, record in BAD.items()]
    out = tmp_path / "out"
    file = write(tmp_path / "r.json", records)
    reports = prepare.prepare(out, [file], image_root=images, max_skip_ratio=1, progress=False)
    assert reports["train"].kept == 4 and reports["train"].rejected == dict.fromkeys(BAD, 1)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {(reject["id"], reject["reason"]) for reject in rejects} == {(reason, reason) for reason in BAD}
    (gone,) = (reject for reject in rejects if reject["reason"] == "missing_image")
    assert gone["key"] == "train_000000004" and str(images / "gone.png") in gone["message"]
    table = format_report(reports).splitlines()
    assert table[0].split()[:6] == ["split", "kept", "images", "trimmed", "left", "out"] and "missing_image" in table[0]
    assert table[1].split()[:5] == ["train", "4", "3", "0", str(len(BAD))]


def test_only_the_line_that_is_not_json_is_skipped(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    reports = prepare.prepare(tmp_path / "out", [tmp_path / "r.jsonl"], max_skip_ratio=0.5, progress=False)
    assert reports["train"].kept == 2 and reports["train"].rejected == {"bad_record": 1}
    (reject,) = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert reject["message"] == "line 2 is not JSON (Expecting value at column 10)"


def hashes(folder: Path) -> dict[str, str]:
    """Returns relative path -> hash of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_folder_does_not_depend_on_the_number_of_processes(
    prepare: ModuleType, tmp_path: Path, images: Path
) -> None:
    records = write(tmp_path / "r.json", (GOOD + list(BAD.values())) * 4)
    options = {"image_root": images, "samples_per_shard": 5, "valid_fraction": 0.4, "max_skip_ratio": 1}
    for workers in (1, 3):
        prepare.prepare(tmp_path / str(workers), [records], workers=workers, progress=False, **options)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    assert len(list((tmp_path / "1").rglob("*.tar"))) > 5


def test_a_run_that_is_killed_repeatedly_ends_with_the_same_bytes(
    prepare: ModuleType, tmp_path: Path, images: Path
) -> None:
    Image.effect_noise((500, 400), 60).save(images / "slow.png")  # so that writing a shard takes a while
    slow = [{"id": i, "image": "slow.png", "conversations": talk("<image>?", f"It is {i}.")} for i in range(200)]
    records = [record for pair in zip(slow, GOOD * 50, strict=True) for record in pair] + list(BAD.values())
    arguments = {"train": [write(tmp_path / "r.json", records)], "image_root": images, "samples_per_shard": 10}
    arguments |= {"valid_fraction": 0.1, "workers": 2, "progress": False}
    prepare.prepare(tmp_path / "whole", **arguments)
    out, finished = tmp_path / "killed", set[str]()

    def notes() -> set[str]:
        return {path.stem for path in out.glob(".prepare/done/*.json")}

    moments = [lambda: notes(), lambda: len(notes()) >= len(finished) + 6, lambda: (out / ".nv-meta").exists()]
    for moment in moments:
        process = multiprocessing.get_context("fork").Process(target=prepare.prepare, args=(out,), kwargs=arguments)
        process.start()
        deadline = time.monotonic() + 60
        while not moment():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert finished < notes() and not (out / ".nv-meta/dataset.yaml").exists()
        finished = notes()
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/*.tar") if f"train-{path.stem}" in finished}
    prepare.prepare(out, **arguments)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert made and made == {path: path.stat().st_mtime_ns for path in made}, "finished shards were written again"


def test_a_run_killed_during_clean_up_only_finishes_the_clean_up(
    prepare: ModuleType, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, out = [write(tmp_path / "r.json", [*GOOD, BAD["bad_image"]])], tmp_path / "out"

    def killed(work: Path) -> None:
        (work / "plan.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_clean_up", killed)
        prepare.prepare(out, records, image_root=images, max_skip_ratio=1, progress=False)
    before = (out / "train/image-000000.tar").stat().st_mtime_ns
    reports = prepare.prepare(out, records, image_root=images, max_skip_ratio=1, progress=False)
    assert reports["train"].kept == 4 and reports["train"].rejected == {"bad_image": 1}
    assert not (out / ".prepare").exists() and (out / "train/image-000000.tar").stat().st_mtime_ns == before


def test_an_unfinished_folder_is_not_mixed_with_another_run(prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    out, other = tmp_path / "out", write(tmp_path / "other.json", GOOD[2:])
    bad = write(tmp_path / "bad.json", [*GOOD, BAD["missing_image"]])
    with pytest.raises(prepare.TooManyRejectsError, match=r"1 of 5 records .* more than --max-skip-ratio 0.1"):
        prepare.prepare(out, [bad], image_root=images, progress=False)
    assert not (out / ".nv-meta").exists()
    with pytest.raises(ValueError, match=r"unfinished run with other arguments or records \(--train\)"):
        prepare.prepare(out, [other], image_root=images, progress=False)
    (images / "gone.png").write_bytes(picture())
    prepare.prepare(out, [bad], image_root=images, overwrite=True, progress=False)
    assert (out / "rejects.jsonl").read_text() == ""
    prepare.prepare(out, [other], image_root=images, overwrite=True, progress=False)
    prepare.prepare(tmp_path / "new", [other], image_root=images, progress=False)
    assert hashes(out) == hashes(tmp_path / "new")


def test_a_higher_skip_ratio_continues_without_repeating_the_work(
    prepare: ModuleType, tmp_path: Path, images: Path
) -> None:
    records = [write(tmp_path / "r.json", [*GOOD, BAD["bad_image"]])]
    with pytest.raises(prepare.TooManyRejectsError):
        prepare.prepare(tmp_path / "out", records, image_root=images, progress=False)
    (images / "a.png").unlink()  # reading it again would fail
    reports = prepare.prepare(tmp_path / "out", records, image_root=images, max_skip_ratio=0.2, progress=False)
    assert reports["train"].kept == 4 and reports["train"].rejected == {"bad_image": 1}


def test_shards_of_another_program_are_not_touched(prepare: ModuleType, tmp_path: Path) -> None:
    theirs = tmp_path / "out/train/images.tar"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds train/images.tar, which this program did not write"):
            prepare.prepare(theirs.parents[1], [write(tmp_path / "r.json", GOOD[2:])], overwrite=overwrite)
    assert theirs.read_bytes() == b"theirs"


def test_a_worker_process_that_dies_is_reported_and_the_run_can_continue(
    prepare: ModuleType, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [write(tmp_path / "r.json", GOOD * 6)]
    options = {"image_root": images, "samples_per_shard": 4, "workers": 2, "progress": False}
    write_shard = prepare.write_shard
    monkeypatch.setattr(prepare, "write_shard", die)
    with pytest.raises(ValueError, match=r"A worker process died.*--workers 2.*the same command continues"):
        prepare.prepare(tmp_path / "out", records, **options)
    monkeypatch.setattr(prepare, "write_shard", write_shard)
    assert prepare.prepare(tmp_path / "out", records, **options)["train"].kept == 24


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "unsafe_path"),
        ("sub/../../secret.png", "unsafe_path"),
        ("{outside}/secret.png", "unsafe_path"),
        ("a.png\0", "unsafe_path"),
        ("sub", "missing_image"),
        ("a.png/b.png", "missing_image"),
        ("x" * 300, "missing_image"),
        ("sub/../a.png", None),
        ("{inside}/a.png", None),
    ],
)
def test_images_are_read_only_from_below_the_image_root(
    path: str, reason: str | None, prepare: ModuleType, tmp_path: Path, images: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    path = path.format(outside=tmp_path, inside=images)
    record = {"image": path, "conversations": talk("<image>?", "No.")}
    records = [write(tmp_path / "r.json", [*GOOD, record])]
    reports = prepare.prepare(tmp_path / "out", records, image_root=images, max_skip_ratio=1, progress=False)
    assert reports["train"].rejected == ({reason: 1} if reason else {})


def test_the_validation_share_is_disjoint_and_stable_when_records_are_added(
    prepare: ModuleType, tmp_path: Path
) -> None:
    texts = [{"text": f"Text {i}."} for i in range(200)]
    chosen = []
    for count in (100, 200):
        out = tmp_path / str(count)
        prepare.prepare(out, [write(tmp_path / "r.json", texts[:count])], valid_fraction=0.2, progress=False)
        train, valid = (members(next((out / split).glob("*.tar"))) for split in ("train", "val"))
        assert train.keys().isdisjoint(valid) and len(train) + len(valid) == count and 0.1 < len(valid) / count < 0.3
        chosen.append(list(valid))
    assert chosen[1][: len(chosen[0])] == chosen[0]


def test_validation_keeps_the_order_of_its_records(prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    records = [write(tmp_path / "r.json", GOOD)]
    prepare.prepare(tmp_path / "out", records, records, image_root=images, progress=False)
    files = members(tmp_path / "out/val/shard-000000.tar")
    assert [json.loads(data) for key, data in files.items() if key.endswith(".json")] == GOOD


def test_a_turn_with_nothing_to_learn_is_trimmed_and_counted(prepare: ModuleType, tmp_path: Path) -> None:
    turns = talk("a", "b") + talk("c", "d")
    records = [{"conversations": some} for some in (turns[1:], turns[:3], turns[1:3] + turns[:3])]
    out = tmp_path / "out"
    reports = prepare.prepare(out, [write(tmp_path / "r.json", records)], progress=False, max_skip_ratio=1)
    kept = [json.loads(data)["conversations"] for data in members(out / "train/text-000000.tar").values()]
    assert kept == [turns[2:], turns[:2]] and reports["train"].trimmed == 2
    assert reports["train"].rejected == {"role_order": 1}


def test_empty_shards_are_not_kept(prepare: ModuleType, tmp_path: Path) -> None:
    records = [write(tmp_path / "r.json", [BAD["role_order"]] * 3 + [GOOD[3]] * 3)]
    prepare.prepare(tmp_path / "out", records, samples_per_shard=3, max_skip_ratio=1, progress=False)
    assert [path.name for path in (tmp_path / "out/train").glob("*.tar")] == ["text-000001.tar"]


def test_a_record_that_is_not_valid_unicode_is_skipped_with_its_reason(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"id": "\\ud800", "text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    reports = prepare.prepare(tmp_path / "out", [tmp_path / "r.jsonl"], max_skip_ratio=1, progress=False)
    assert reports["train"].kept == 1 and reports["train"].rejected == {"invalid_unicode": 2}


@pytest.mark.parametrize(
    "content",
    [
        b'[{"text": "\xff\xfe"}]',
        b'[{"text": "\0"}]',
        b"[]",
        b"[1, 2",
        b"\0\0\0",
        b"",
        b'[{"text": "a"}] and more',
        b"\xff\xfe[",
    ],
)
def test_a_file_that_is_not_json_is_refused_in_one_sentence(
    content: bytes, prepare: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^The records .*r.json cannot be read as --format llava: it is .*\.$"
    ) as error:
        prepare.prepare(tmp_path / "out", [tmp_path / "r.json"], progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["/nowhere.json"]}, "/nowhere.json cannot be read"),
        ({"train": [__file__]}, "it is neither a JSON list nor JSON lines"),
        ({"source_format": "llama"}, "--format llama is unknown: choose one of llava, "),
        ({"source_format": "mimic_it"}, "give --image-files"),
        ({"image_files": ["LA.json"]}, "--image-files is not for --format llava"),
        ({"max_skip_ratio": 2}, "--max-skip-ratio 2 is not in"),
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
    assert [path.name for path in (out / "train").glob("*.tar")] == ["text-000000.tar"]


def test_no_usable_record_is_an_error(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No training record could be used"):
        prepare.prepare(tmp_path / "out", [write(tmp_path / "r.json", [BAD["role_order"]])], progress=False)


def test_the_program_prints_its_table_and_explains_mistakes(
    prepare: ModuleType,
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "r.json", [*GOOD, BAD["bad_image"]])
    monkeypatch.chdir(tmp_path)
    command = [str(PROGRAM), "--train", "r.json", "--image-root", "images", "--output", "out"]
    row = ["train", "4", "3", "0", "1", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^prepare.py: 1 of 5 records cannot be used, more than --max-skip-ratio 0.1"):
        main()
    assert capsys.readouterr().out.splitlines()[1].split() == row
    done = subprocess.run([sys.executable, *command, "--max-skip-ratio", "0.2"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[1].split() == row, done.stderr
    with pytest.raises(SystemExit) as ended:
        main()
    message = "prepare.py: error: --output out holds prepared shards already: give another folder, or --overwrite."
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == message


def test_a_blend_can_use_only_the_text_shards(prepare: ModuleType, tmp_path: Path, images: Path) -> None:
    records = [write(tmp_path / "r.json", GOOD)]
    prepare.prepare(tmp_path / "out", records, image_root=images, progress=False)
    blend = {"blend": [{"path": "out", "split_part": "train_text", "weight": 1}]}
    header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(header | {"splits": {"train": blend}}))
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    kept = {}
    for name, options in (("blend.yaml", {}), ("out", {"split_part": "train_image"}), ("out", {})):
        dataset = get_train_dataset(
            tmp_path / name,
            worker_config=config,
            batch_size=1,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Keys(),
            **options,
        )
        batches = itertools.islice(get_loader(dataset), 12)
        kept[name, *options] = {int(key[-9:]) for batch in batches for key in batch}
    assert list(kept.values()) == [{2, 3}, {0, 1}, {0, 1, 2, 3}]


class Keys(DefaultTaskEncoder):
    """Returns the keys of samples as a batch."""

    cookers = (Cooker(stateless(lambda sample: sample)),)
    decoder = None

    def batch(self, samples: list[Any]) -> list[str]:
        return [sample["__key__"] for sample in samples]


def test_the_documented_commands_prepare_every_source_of_the_papers_blends(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    places = {"$DATA": "tests/fixtures/data", "$SHARDS": str(tmp_path)}
    blocks = re.findall(r"```\n(python tools/data/prepare.py .*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    for block in blocks:
        command = functools.reduce(lambda text, place: text.replace(*place), places.items(), block.replace("\\\n", ""))
        monkeypatch.setattr(sys, "argv", [*command.split()[1:], "--workers", "1"])
        main()
    tables = re.findall(r"train +(\d+) +(\d+) +(\d+) +(\d+)\n", capsys.readouterr().out)
    assert tables == [tuple("7510"), tuple("2200"), *[tuple("1100")] * 2, *[tuple("3300")] * 2]
    weights = {}
    for name in ("data_stage1.yaml", "data_stage2.yaml"):
        shutil.copy(ROOT / "examples/mixtral_8x7b_internvit" / name, tmp_path)
        blend = load_dataset(tmp_path / name)
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        loaded = blend.get_datasets(training=True, split_part="train", worker_config=config).datasets
        weights[name] = {source.dataset.path.name: round(1629 * source.weight) for source in loaded}
        assert all(len(source.dataset) for source in loaded)
    assert weights["data_stage1.yaml"] == {"llava_pretrain_558k": 1629}
    stage2 = {"svit_157k": 157, "lvis_instruct_220k": 220, "lrv_instruct_331k": 331, "mimic_it_256k": 256}
    assert weights["data_stage2.yaml"] == stage2 | {"llava_mix_665k": 665}
