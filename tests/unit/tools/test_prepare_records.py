# SPDX-License-Identifier: Apache-2.0
"""tools/data/prepare.py: what it reports about unusable records and images."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_smar.data.sources.report import format_report

from .test_prepare import GOOD, images, members, prepare, talk, write

__all__ = ["images", "prepare"]  # fixtures


def test_images_under_the_other_key_are_kept_and_refused_without_tags(
    prepare: ModuleType, tmp_path: Path, images: Path
) -> None:
    records = [
        {"images": ["a.png"], "conversations": talk("<image>?", "A."), "mood": "good", "video": None},
        {"images": ["a.png"], "conversations": talk("What?", "A.")},
        {"images": [""], "conversations": talk("What?", "A."), "mood": "", "system": "Be brief."},
        {"conversations": None, "text": "Plain.", "mood": "bad", "video": []},
    ]
    out = tmp_path / "out"
    file = write(tmp_path / "r.json", records)
    reports = prepare.prepare(out, [file], image_root=images, max_skip_ratio=1, progress=False)
    report = reports["train"]
    assert (report.kept, report.images, report.rejected) == (3, 1, {"image_count_mismatch": 1})
    (reject,) = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert reject["message"].startswith("0 <image> tags but 1 image: ")
    assert report.unread == {"mood": 2}
    assert format_report(reports).splitlines()[-1] == "Keys that were not read: `mood` in 2 samples"
    assert prepare.SplitReport.from_json(json.loads(json.dumps(vars(report)))) == report


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("damaged.png", "{root}/damaged.png: an image cannot be decoded"),
        (["a.png", "damaged.png", "b.PNG"], "image 2 of 3: {root}/damaged.png: an image cannot be decoded"),
        (["a.png", "b.PNG", "gone.png"], "image 3 of 3: {root}/gone.png is not there"),
        (["../a.png", "b.PNG"], "image 1 of 2: '../a.png' leads out of the image root"),
    ],
)
def test_an_unusable_image_is_reported_with_its_path_and_number(
    paths: Any, message: str, prepare: ModuleType, tmp_path: Path, images: Path
) -> None:
    tags = "<image>" * (len(paths) if isinstance(paths, list) else 1)
    records = [write(tmp_path / "r.json", [{"image": paths, "conversations": talk(tags, "A.")}, *GOOD])]
    prepare.prepare(tmp_path / "out", records, image_root=images, max_skip_ratio=1, progress=False)
    (reject,) = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert reject["message"].startswith(message.format(root=images))


def test_a_record_with_an_id_beyond_64_bits_is_read(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(f'[{{"id": {2**64}, "text": "a"}}]')
    prepare.prepare(tmp_path / "out", [tmp_path / "r.json"], progress=False)
    (data,) = members(tmp_path / "out/train/text-000000.tar").values()
    assert json.loads(data) == {"id": 2**64, "text": "a"}
