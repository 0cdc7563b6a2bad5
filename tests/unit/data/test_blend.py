# SPDX-License-Identifier: Apache-2.0
"""The share of text-only samples, over real shards and metadatasets."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_smar.data import DataConfig, DataError, EnergonIterator, VisionLanguageBatch, build_train_loader

from .conftest import picture, talk

Make = Callable[..., DataConfig]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def read(
    config: DataConfig, tokenizer: Any, count: int, rank: int = 0, size: int = 1, state: Any = None
) -> list[VisionLanguageBatch]:
    loader = build_train_loader(config, tokenizer, rank, size, decode_images=False)
    iterator = EnergonIterator(loader, config)
    if state is not None:
        iterator.restore_state(state)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, prepare_module: ModuleType) -> Path:
    """A blend of sources: `a` (30 samples with an image, 10 texts), `b` (20 with an image, every fourth too long) and
    `c` (15 texts, with three times the weight)."""
    root = tmp_path_factory.mktemp("sources")
    (root / "one.png").write_bytes(picture())
    counts = {"a": (30, 10), "b": (20, 0), "c": (0, 15)}
    weights = {"a": 40, "b": 20, "c": 45}
    for name, (images, texts) in counts.items():
        records: list[dict[str, Any]] = [
            {
                "id": f"{name}{i}",
                "image": "one.png",
                "conversations": talk("<image>\nWhat?", "It. " * (200 if name == "b" and i % 4 == 0 else 1)),
            }
            for i in range(images)
        ]
        records += [{"id": f"{name}t{i}", "text": f"The sun rises, {i}."} for i in range(texts)]
        (root / f"{name}.json").write_text(json.dumps(records))
        prepare_module.prepare(
            root / name, [root / f"{name}.json"], image_root=root, samples_per_shard=10, progress=False
        )
    blend = [{"path": f"./{name}", "weight": weights[name]} for name in counts]
    (root / "data.yaml").write_text(
        yaml.safe_dump(
            {
                "__module__": "megatron.energon",
                "__class__": "MetadatasetV2",
                "splits": {"train": {"blend": blend}},
            }
        )
    )
    return root


def settings(sources: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data_path": str(sources / "data.yaml"),
        "text_only_ratio": 0.025,
        "verify_images": False,
        "max_skip_ratio": 1.0,
    } | changes


def test_the_ratio_holds_over_four_thousand_samples_of_two_ranks(
    make_config: Make, tokenizer: Any, sources: Path
) -> None:
    config = make_config(**settings(sources, micro_batch_size=10))
    batches = [batch for rank in range(2) for batch in read(config, tokenizer, 200, rank, 2)]
    total = sum(len(batch.__key__) for batch in batches)
    text_only = sum(batch.num_text_only for batch in batches)
    assert total == 4_000
    assert abs(text_only / total - 0.025) <= 0.001  # samples that are too long were skipped


def test_no_run_of_samples_deviates_by_a_full_sample(make_config: Make, tokenizer: Any, sources: Path) -> None:
    config = make_config(**settings(sources, text_only_ratio=0.3, micro_batch_size=1))
    kinds = [batch.num_text_only for batch in read(config, tokenizer, 300)]
    for begin in range(0, 290, 7):
        for length in (1, 5, 10, 100):
            stretch = kinds[begin : begin + length]
            assert abs(sum(stretch) - 0.3 * len(stretch)) < 1


def test_the_blends_weights_hold_within_each_kind(make_config: Make, tokenizer: Any, sources: Path) -> None:
    config = make_config(**settings(sources, text_only_ratio=0.5, micro_batch_size=50, seq_length=2000))
    rows = [ids for batch in read(config, tokenizer, 60) for ids in batch.input_ids]
    texts = [match[1] for ids in rows if (match := re.search(r"rises, (\d+)", tokenizer.detokenize(ids.tolist())))]
    # Among the texts, `a` has the numbers 0 to 9 and weight 10 of 55; `c` has 0 to 14 and weight 45.
    assert len(texts) == len(rows) / 2
    share = sum(int(number) > 9 for number in texts) / len(texts)
    assert abs(share - 45 / 55 * 5 / 15) < 0.05


def test_resuming_keeps_the_ratio_and_the_order(make_config: Make, tokenizer: Any, sources: Path) -> None:
    config = make_config(**settings(sources, text_only_ratio=0.2, micro_batch_size=3))
    iterator = EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config)
    for _ in range(5):
        next(iterator)
    state = iterator.save_state()
    expected = [(batch.__key__, batch.num_text_only) for batch in (next(iterator) for _ in range(20))]
    iterator.close()
    assert [(batch.__key__, batch.num_text_only) for batch in read(config, tokenizer, 20, state=state)] == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [("c", "the data has no samples with images"), ("b", "the data has no text-only samples")],
)
def test_data_of_one_kind_is_refused(make_config: Make, tokenizer: Any, sources: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(make_config(**settings(sources, data_path=str(sources / path))), tokenizer, 1)


def test_shards_whose_kind_is_unknown_are_refused(
    make_config: Make, tokenizer: Any, sources: Path, tmp_path: Path
) -> None:
    shutil.copytree(sources / "a", tmp_path / "a")
    split = tmp_path / "a" / ".nv-meta" / "split.yaml"
    content = yaml.safe_load(split.read_text())
    del content["split_parts"]["train_text"]
    split.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match="no train_text and train_image for them all"):
        read(make_config(**settings(sources, data_path=str(tmp_path / "a"))), tokenizer, 1)


def test_samples_of_a_blend_are_named_with_their_source(
    make_config: Make, tokenizer: Any, sources: Path, tmp_path: Path
) -> None:
    """All prepared folders number their samples from 0."""
    config = make_config(**settings(sources, text_only_ratio=None, rejects_dir=str(tmp_path)))
    keys = {key for batch in read(config, tokenizer, 300) for key in batch.__key__}
    assert {key.split("/")[0] for key in keys} == {"a", "b", "c"} and len(keys) == 30 + 10 + 15 + 15
    reported = [json.loads(line)["key"] for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(reported) == [f"b/train_{i:09d}" for i in range(0, 20, 4)]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 2.5])
def test_a_ratio_outside_of_0_to_1_is_refused(make_config: Make, sources: Path, ratio: float) -> None:
    with pytest.raises(ValueError, match="--text-only-ratio"):
        make_config(**settings(sources, text_only_ratio=ratio))
