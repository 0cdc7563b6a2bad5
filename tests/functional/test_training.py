# SPDX-License-Identifier: Apache-2.0
"""Runs the training program as a user does."""

import json
import os
import re
from collections import Counter

import pytest

from megatron_smar.model.parts import part_of
from megatron_smar.report.scalars import read_scalars
from tests.launch import ROOT, TWO_STEPS, load_weights, run

SMAR = ["--modality-routing", "smar", "--smar-d-min", "3", "--smar-d-max", "4", "--smar-coeff", "0.1"]


def losses(log_dir, name="lm loss") -> dict[int, float]:
    series = read_scalars(log_dir)[name]
    return dict(zip(series.steps, series.values, strict=True))


ALONE = [*SMAR, "--smar-scope", "local", "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 10]
TENSOR = ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-tensor-parallel-size", 1]
TENSOR += ["--make-vocab-size-divisible-by", 32]  # the same padded vocabulary as on one rank
ONE_REPLICA = {
    "TP 2 + SP": TENSOR,
    "PP 2": ["--pipeline-model-parallel-size", 2],
    "TP 2 x EP 2": [*TENSOR, "--expert-model-parallel-size", 2],
    "CP 2": ["--context-parallel-size", 2],
    "CP 2 x EP 2": ["--context-parallel-size", 2, "--expert-model-parallel-size", 2],
}
STEPS = {"lm loss": 1e-5, "mrd distance": 1e-4, "grad-norm": 1e-4}  # compared values, and their largest deviation


@pytest.fixture(scope="module")
def start(world, tmp_path_factory):
    """Returns the flags to start from the same weights under any layout."""
    folder = tmp_path_factory.mktemp("start")
    world.train(
        *ALONE,
        "--train-iters",
        1,
        "--num-workers",
        0,
        "--no-save-optim",
        "--save",
        folder,
        "--save-interval",
        1,
        ranks=1,
    )
    return ["--load", folder, "--finetune"]


@pytest.fixture(scope="module")
def one_rank(world, start, tmp_path_factory):
    """Returns the TensorBoard folder of ten steps on one rank with two data workers."""
    folder = tmp_path_factory.mktemp("one_rank")
    world.train(*ALONE, *start, "--num-workers", 2, "--tensorboard-dir", folder, ranks=1)
    return folder


def work_per_token(folder, ranks):
    """Returns the model operations of all ranks and the tiles, per token, of each step: times cancel out."""
    scalars = {name: read_scalars(folder)[f"throughput/{name}"].values for name in RATES}
    operations, tiles, tokens = (scalars[name] for name in RATES)
    return [ranks * o / n * 1e12 + t / n for o, t, n in zip(operations, tiles, tokens, strict=True)]


RATES = ("model_tflops", "tiles_per_second", "tokens_per_second")


@pytest.mark.matrix  # tests/distributed/test_exactness.py compares the layouts in `make test`
def test_ten_losses_agree_between_one_rank_and_two_with_expert_parallelism(world, start, one_rank, tmp_path):
    """Both runs read the same micro-batches: one rank with two data workers, two ranks with one each."""
    two = [*start, "--num-workers", 1, "--expert-model-parallel-size", 2, "--tensorboard-dir", tmp_path]
    world.train(*ALONE, *two, ranks=2)
    for name in ("lm loss", "smar loss", "mrd distance"):
        one, two = losses(one_rank, name), losses(tmp_path, name)
        assert list(one) == list(range(1, 11))
        assert one == pytest.approx(two, abs=1e-4), name
    assert losses(one_rank)[10] < losses(one_rank)[1] - 0.5, "ten equal losses of a model that learns"
    one, two = work_per_token(one_rank, ranks=1), work_per_token(tmp_path, ranks=2)
    assert one == pytest.approx(two, rel=1e-5), "tokens, tiles or operations are counted twice or not at all"
    assert len(set(one)) == 10, "the steps have different pictures and lengths"


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ONE_REPLICA)
def test_training_steps_depend_on_the_layout(world, start, one_rank, tmp_path, layout):
    """Six steps on real sequences, whose context-parallel shares have different numbers of loss tokens."""
    flags = [*ALONE, *start, *ONE_REPLICA[layout], "--exit-interval", 6, "--num-workers", 2]
    world.train(*flags, "--tensorboard-dir", tmp_path, ranks=2)
    worst = {}
    for name, tolerance in STEPS.items():
        one, two = losses(one_rank, name), losses(tmp_path, name)
        assert list(two) == list(range(1, 7))
        worst[name] = max(abs(two[step] - one[step]) for step in two)
        assert worst[name] < tolerance, (name, one, two)
    if table := os.environ.get("EXACTNESS_TABLE"):
        with (ROOT / table).open("a", encoding="utf-8") as file:
            file.write(f"| {layout} | {' | '.join(f'{deviation:.1e}' for deviation in worst.values())} |\n")


STAGE_1 = ["--freeze", "vision", "language"]
PIPELINE = ["--pipeline-model-parallel-size", 2]
EXPERTS = ["--expert-model-parallel-size", 2]
RESUMED = {
    "stage 2, experts, distributed optimizer": [*SMAR, *EXPERTS, "--use-distributed-optimizer"],
    "stage 2, per-token loss": [*SMAR, *EXPERTS, "--calculate-per-token-loss", "--smar-warmup-iters", 6],
    # A complete pipeline stage, half of the experts' ranks or half of the optimizer's shards has nothing to train.
    "stage 1, pipeline": [*STAGE_1, *PIPELINE],
    "stage 1, pipeline, distributed optimizer": [*STAGE_1, *PIPELINE, "--use-distributed-optimizer"],
    "stage 1, experts": [*STAGE_1, *EXPERTS],
    "stage 1, experts, distributed optimizer": [*STAGE_1, *EXPERTS, "--use-distributed-optimizer"],
}
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
RESUMED["stage 2, overlapped, 2 micro-batches"] = [*SMAR, *EXPERTS, *OVERLAP, "--micro-batch-size", 2]
PACKS = ["--micro-batch-size", 1, "--global-batch-size", 4, "--packing-buffer-size", 20, "--packing-max-tiles", 9]
PACKS += ["--max-tiles", 4, "--use-thumbnail", "--text-only-ratio", 0.25]
RESUMED["packs of tiles and text"] = [*SMAR, *EXPERTS, *PACKS]
RESUMED["packs, square-root loss weighting"] = [*SMAR, *EXPERTS, *PACKS, "--loss-weighting", "sqrt"]


@pytest.mark.matrix  # tests/chaos and test_resume.py have the same in short
@pytest.mark.parametrize("setting", RESUMED)
def test_resuming_gives_bit_identical_losses(world, tmp_path, setting):
    common = ["--micro-batch-size", 4, "--global-batch-size", 8, "--num-workers", 1, "--train-iters", 8]
    common += [*RESUMED[setting], "--save-interval", 4]
    world.train(*common, "--save", tmp_path / "a", "--tensorboard-dir", tmp_path / "uninterrupted", ranks=2)
    stop = ["--save", tmp_path / "b", "--load", tmp_path / "b"]
    if "stage 1" in setting:
        stop += ["--dataloader-save", tmp_path / "loader"]  # not with the checkpoint
    world.train(*common, *stop, "--exit-interval", 4, "--tensorboard-dir", tmp_path / "first", ranks=2)
    output = world.train(*common, *stop, "--tensorboard-dir", tmp_path / "second", ranks=2).stdout
    assert ("(--loss-weighting sqrt)" in output) == ("--loss-weighting" in common), "the summary's line of the loss"
    for name in ("lm loss", "smar loss", "grad-norm"):
        uninterrupted = losses(tmp_path / "uninterrupted", name)
        resumed = losses(tmp_path / "first", name) | losses(tmp_path / "second", name)
        assert sorted(losses(tmp_path / "second", name)) == [5, 6, 7, 8]
        assert resumed == uninterrupted, f"{name} differs after resuming"
    assert losses(tmp_path / "uninterrupted", "grad-norm")[8] > 0, "nothing was trained"
    if PACKS[-1] in common:
        text_only = losses(tmp_path / "uninterrupted", "text-only ratio").values()
        assert abs(sum(text_only) / len(text_only) - 0.25) < 0.05
        assert min(losses(tmp_path / "uninterrupted", "fill").values()) > 0.5


def test_validation_runs_without_a_training_step(world):
    flags = ["--micro-batch-size", 4, "--global-batch-size", 8, "--num-workers", 0, "--train-iters", 8]
    output = world.train(*SMAR, *flags, "--skip-train", "--eval-iters", 1).stdout
    assert "validation loss at" in output


def test_losses_and_distances_are_logged_to_console_and_tensorboard(world, tmp_path):
    flags = [*SMAR, "--micro-batch-size", 8, "--global-batch-size", 8, "--num-workers", 0, "--train-iters", 3]
    output = world.train(*flags, "--tensorboard-dir", tmp_path, "--eval-iters", 1, "--eval-interval", 3).stdout
    (line,) = [line for line in output.splitlines() if " iteration        3/       3 |" in line]
    for name in ("lm loss", "smar loss", "mrd distance"):
        assert f" {name}: " in line
    scalars = read_scalars(tmp_path)
    layers = [scalars[f"moe/mrd_distance_layer_{layer}"].values for layer in (1, 2)]
    assert len(layers[0]) == 3
    for step, distance in enumerate(scalars["mrd distance"].values):
        assert distance == pytest.approx((layers[0][step] + layers[1][step]) / 2, rel=1e-5)
    assert scalars["smar loss"].values[0] == pytest.approx(3 - scalars["mrd distance"].values[0], rel=1e-4)
    assert "validation loss at iteration 3" in output


MODEL_PARALLEL = [
    "--tensor-model-parallel-size",
    2,
    "--sequence-parallel",
    *EXPERTS,
    "--expert-tensor-parallel-size",
    1,
]
LAYOUTS = {"TP 2 x EP 2": MODEL_PARALLEL, "PP 2": PIPELINE, "DP 2": ["--use-distributed-optimizer"]}


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[] if n == "TP 2 x EP 2" else pytest.mark.matrix) for n in LAYOUTS]
)
def test_the_printed_summary_has_the_parameter_counts_of_the_checkpoint(world, tmp_path, layout):
    flags = [*SMAR, *LAYOUTS[layout], "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 4]
    flags += ["--num-workers", 0, "--save", tmp_path, "--save-interval", 4]
    lines = world.train(*flags, ranks=2).stdout.splitlines()
    first = next(index for index, line in enumerate(lines) if "iteration        1/" in line)
    assert first < 40 and len(lines) < 60, "\n".join(lines)
    counts = Counter()
    for name, weight in load_weights(tmp_path / "iter_0000004").items():
        if "_extra_state" not in name:
            counts[part_of(name)] += weight.numel()
    shown = {words[0]: words[1:3] for words in map(str.split, lines[:first]) if len(words) >= 3}
    for part, count in counts.items():
        assert shown[part] == [f"{count:,}", "frozen" if part == "vision" else "learns"]
    assert shown["all"][0] == f"{counts.total():,}"
    assert "num_experts ..." in (tmp_path / "arguments.txt").read_text()
    assert "ETA 0:00:00 |" in next(line for line in lines if "iteration        4/" in line)


@pytest.mark.parametrize(
    "freeze",
    [
        pytest.param(["vision", "language"], id="stage 1"),
        pytest.param(["vision"], id="stage 2", marks=pytest.mark.matrix),
    ],
)
def test_batches_without_images_train_in_every_stage(world, freeze):
    """No rank may skip its backward pass, in whose collectives the others wait; a hang would run into the timeout."""
    flags = [*SMAR, "--freeze", *freeze, "--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 2]
    flags += ["--num-workers", 0, "--expert-model-parallel-size", 2, "--use-distributed-optimizer"]
    output = world.train(*flags, "--data-path", world.root / "shards" / "text", ranks=2, timeout=120).stdout
    assert "smar loss: 0.000000E+00" in output
    assert "number of nan iterations" not in output, "shown although there are none"


@pytest.mark.matrix
def test_evaluation_loads_the_model_from_the_checkpoint_and_gives_the_same_under_another_layout(world, tmp_path):
    flags = [*SMAR, "--micro-batch-size", 8, "--global-batch-size", 16, "--train-iters", 30, "--num-workers", 1]
    world.train(*flags, "--expert-model-parallel-size", 2, "--save", tmp_path, "--save-interval", 30, ranks=2)
    items = [
        {"image": r["image"], "question": r["conversations"][0]["value"], "answer": r["conversations"][1]["value"]}
        for r in json.loads((world.root / "valid.json").read_text())
    ]
    (tmp_path / "vqa.json").write_text(json.dumps(items))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "You may reproduce and distribute copies of the Work."}))
    measured = ["--text", tmp_path / "text.jsonl", "--vqa", tmp_path / "vqa.json", "--image-root", world.root]
    measured += ["--examples", 4]
    results = {}
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        layout = ["--expert-model-parallel-size", ranks]
        run("tools/evaluate.py", "--load", tmp_path, *layout, *measured, "--output", output, ranks=ranks)
        results[ranks] = json.loads(output.read_text())
    assert results[1]["word_accuracy"] == results[2]["word_accuracy"]
    assert results[1]["text_perplexity"] == pytest.approx(results[2]["text_perplexity"], rel=1e-4)
    assert results[1]["mrd_distance_by_layer"] == pytest.approx(results[2]["mrd_distance_by_layer"], rel=1e-3)
    for share in results[1]["expert_share"]["vision"]:
        assert sum(share) == pytest.approx(1)
    for example in results[1]["examples"]:  # checked against vqa_accuracy below
        assert isinstance(example["prediction"], str)
    exact = sum(e["prediction"] == e["answer"] for e in results[1]["examples"])
    assert results[1]["vqa_accuracy"] >= exact / len(items)


def test_every_console_line_covers_only_its_own_interval(world, tmp_path):
    """With a line per step, Megatron's second line would be the mean of two steps."""
    done = world.train(*TWO_STEPS, "--train-iters", 3, "--tensorboard-dir", tmp_path)
    shown = [float(value) for value in re.findall(r" lm loss: (\S+)", done.stdout)]
    assert shown == pytest.approx(list(read_scalars(tmp_path)["lm loss"].values), rel=1e-5) and len(set(shown)) == 3
