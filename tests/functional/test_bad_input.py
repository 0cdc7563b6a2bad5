# SPDX-License-Identifier: Apache-2.0
"""A user's mistake gets one sentence with the flag, its value and the fix, on every rank, before training starts."""

import json
import re
import shutil

import pytest

from tests.launch import run

SIZES = ["--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "2", "--num-workers", "0"]
DENSE = ["--num-experts", "0"]

MISTAKES = {
    "band": (
        ["--smar-d-min", "2", "--smar-d-max", "1"],
        ["--smar-d-min 2.0 and --smar-d-max 1.0", "0 <= d_min <= d_max"],
    ),
    "no experts": (["--modality-routing", "smar", *DENSE], ["--modality-routing smar", "--num-experts"]),
    "tensor parallel without sequence parallel": (
        ["--tensor-model-parallel-size", "2"],
        ["--tensor-model-parallel-size 2", "--sequence-parallel"],
    ),
    "unknown vision model": (
        ["--vision-model", "no/such-model"],
        ["--vision-model 'no/such-model'", "neither a folder"],
    ),
    "tile size": (["--image-size", "48"], ["--image-size is 48", "give --image-size 32"]),
    "data folder": (["--data-path", "/no/such/folder"], ["--data-path /no/such/folder", "tools/data/prepare.py"]),
    "nothing to train": (["--freeze", "vision", "connector", "language"], ["--freeze", "nothing to train"]),
    "tokens of a template": (
        ["--conversation-template", "chatml"],
        ["has no token <|im_end|> <|im_start|>", "--conversation-template", "tools/data/add_tokens.py"],
    ),
    "a flag that is none": (
        ["--tensor-model-paralel-size", "2"],
        ["--tensor-model-paralel-size is not a flag", "--tensor-model-parallel-size"],
    ),
    "batch sizes": (
        ["--global-batch-size", "12"],
        ["--global-batch-size 12", "--micro-batch-size 4 x 2 data-parallel", "give a multiple of 8"],
    ),
    "start of nothing": (["--load", "/no/such/checkpoint"], ["--load /no/such/checkpoint does not exist"]),
}


# The hub is asked for twenty seconds.
SLOW = {"unknown vision model": pytest.mark.matrix}


@pytest.mark.parametrize("mistake", [pytest.param(name, marks=SLOW.get(name, ())) for name in MISTAKES])
def test_a_wrong_flag_is_refused_with_the_same_sentence_on_every_rank(world, mistake):
    flags, said = MISTAKES[mistake]
    errors = world.errors(*SIZES, *flags)
    assert errors[0] == errors[1]
    for part in said:
        assert part in errors[0]


def test_a_blend_file_with_a_mistake_or_with_code_is_refused_on_every_rank_before_it_is_loaded(world, tmp_path):
    """The folder's dataset.yaml names a Python file next to it, which energon would run."""
    shutil.copytree(world.root / "shards" / "text", tmp_path / "text")
    meta = tmp_path / "text" / ".nv-meta"
    (meta / "sample_loader.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    safe = (meta / "dataset.yaml").read_text()
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
    blend = tmp_path / "data.yaml"
    for weight, dataset, said in (
        ("'1'", safe, "source 1 (./text): weight is the text '1', but must be a number"),
        (
            "1",
            safe + "sample_loader: sample_loader.py:fn\npart_filter: [json]\n",
            "has the unknown key `sample_loader`",
        ),
    ):
        (meta / "dataset.yaml").write_text(dataset)
        blend.write_text(f"{head}      - path: ./text\n        weight: {weight}\n")
        errors = world.errors(*SIZES, "--data-path", blend)
        assert errors[0] == errors[1] and f"--data-path {blend}" in errors[0] and said in errors[0]
    assert not (tmp_path / "mark").exists()


def test_a_checkpoint_that_does_not_fit_the_flags_is_refused_in_one_sentence(world, tmp_path):
    sizes = [*SIZES, "--save-interval", "2"]
    world.train(*sizes, "--save", tmp_path / "run", ranks=2)

    def refusal(*flags):
        errors = world.errors(*sizes, "--load", tmp_path / "run", *flags)
        assert errors[0] == errors[1]
        return errors[0]

    of_another_shape = refusal("--finetune", "--ffn-hidden-size", "96")
    assert "another model than the flags describe: --ffn-hidden-size is 64 there and is 96 here" in of_another_shape
    without_finetune = refusal("--save", tmp_path / "new", "--freeze", "vision", "language")
    assert "--freeze was vision, not vision language" in without_finetune
    assert "to start a new run from its weights, give --finetune" in without_finetune
    schedule = refusal("--save", tmp_path / "run", "--lr-decay-style", "cosine", "--train-iters", "4")
    assert "--train-iters was 2, not 4, --lr-decay-style was constant, not cosine" in schedule
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("")
    assert "names no step but ''" in refusal("--save", tmp_path / "run")  # Megatron ends with status 0


def test_a_sample_with_a_missing_image_is_reported_skipped_and_counted(world, tmp_path):
    """The image is removed after the preparation, since the preparation program would leave the sample out."""
    records = json.loads((world.root / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records))
    prepared = ["--train", tmp_path / "train.json", "--image-root", world.root, "--output", tmp_path / "shards"]
    run("tools/data/prepare.py", *prepared, "--samples-per-shard", 1000)
    _drop_one_picture(tmp_path / "shards")
    flags = [*SIZES, "--train-iters", "20", "--data-path", tmp_path / "shards", "--rejects-dir", tmp_path / "rejects"]
    output = world.train(*flags, ranks=1).stdout
    assert "image_count_mismatch" in output
    listed = [json.loads(line) for path in (tmp_path / "rejects").glob("*") for line in path.read_text().splitlines()]
    assert {entry["reason"] for entry in listed} == {"image_count_mismatch"}
    assert "iteration       20/      20" in output


def test_too_many_unusable_samples_end_the_run_on_every_rank_with_a_table(world):
    """Two ranks with different samples: the rank that stops first must not leave the other waiting."""
    flags = ["--train-iters", "200", "--log-interval", "100", "--seq-length", "32"]
    done = world.train(*SIZES, *flags, ranks=2, check=False, timeout=180)
    assert done.returncode != 0
    assert "that a worker read from" in done.stdout and "were rejected and --max-skip-ratio is 0.1" in done.stdout
    table = r"^  reason +samples +share +for example\n  too_long +\d+ +\d\d\.\d\d%  train"
    assert re.search(table, done.stdout, re.M)


def _drop_one_picture(shards) -> None:
    """Removes the first image of a shard, and rebuilds the index."""
    import tarfile

    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    (shard,) = shards.glob("train/image-*.tar")
    kept = shard.with_suffix(".new")
    with tarfile.open(shard) as old, tarfile.open(kept, "w") as new:
        dropped = False
        for member in old:
            if member.name.endswith(".png") and not dropped:
                dropped = True
                continue
            new.addfile(member, old.extractfile(member))
    kept.rename(shard)
    meta = shards / ".nv-meta"
    dataset = (meta / "dataset.yaml").read_text()
    shutil.rmtree(meta)
    BaseWebdatasetFactory.prepare_dataset(
        shards,
        [str(shard.relative_to(shards))],
        split_parts_ratio=None,
        split_parts_patterns=[("train", ".*")],
        workers=1,
    )
    (meta / "dataset.yaml").write_text(dataset)
