# SPDX-License-Identifier: Apache-2.0
"""One step of plain gradient descent gives the same weights under every layout as on one rank with the whole batch.

With a learning rate of 1 the difference of the weights is the gradient, so every parameter's gradient is compared,
after all of Megatron's reductions, through the checkpoint that the layout writes.
"""

from pathlib import Path

import pytest
import torch

from tests.launch import SMALL_MODEL, load_weights, run

IMAGE, SIDE, TOKENS_PER_TILE, ROWS, LENGTH = 5, 32, 4, 4, 32
SMAR = [
    "--modality-routing",
    "smar",
    "--smar-coeff",
    "0.5",
    "--smar-d-min",
    "3",
    "--smar-d-max",
    "4",
    "--smar-eps",
    "1e-3",
]
DESCENT = """
    --optimizer sgd --lr 1 --sgd-momentum 0 --weight-decay 0 --clip-grad 0 --lr-decay-style constant --train-iters 1
    --tokenizer-type NullTokenizer --vocab-size 128 --global-batch-size 4 --freeze vision --no-save-optim
""".split()
LAYOUTS = {
    "data parallel 2": ["--micro-batch-size", "2"],
    "expert parallel 2": ["--micro-batch-size", "2", "--expert-model-parallel-size", "2"],
    "tensor and sequence parallel 2": [
        *["--micro-batch-size", "4", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
        *["--expert-tensor-parallel-size", "1"],
    ],
    "pipeline parallel 2": [
        "--micro-batch-size",
        "4",
        "--pipeline-model-parallel-size",
        "2",
        "--seq-length",
        str(LENGTH),
    ],
    "all-gather dispatcher": [
        *["--micro-batch-size", "2", "--expert-model-parallel-size", "2"],
        *["--moe-token-dispatcher-type", "allgather"],
    ],
    "full recomputation": [
        *["--micro-batch-size", "2", "--recompute-granularity", "full", "--recompute-method", "uniform"],
        *["--recompute-num-layers", "1"],
    ],
}


def make_batch() -> dict:
    """Very different rows: pure text, mostly pictures, two pictures and padding, and pictures with much padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 128, (ROWS, LENGTH), generator=generator)
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding[2, 28:], padding[3, 20:] = True, True
    starts = {0: [], 1: [0, 4, 8, 12, 16], 2: [2, 10], 3: [3]}
    for row, places in starts.items():
        for place in places:
            ids[row, place : place + TOKENS_PER_TILE] = IMAGE
    mask = torch.zeros(ROWS, LENGTH)
    mask[:, 8:18] = 1  # as many loss tokens in each row: Megatron averages the ranks' means
    pixels = [torch.randn(len(places), 3, SIDE, SIDE, generator=generator) for places in starts.values()]
    labels = torch.randint(6, 128, (ROWS, LENGTH), generator=generator)
    return {
        "ids": ids,
        "labels": labels,
        "mask": mask,
        "padding": padding,
        "pixels": pixels,
        "image_token_id": IMAGE,
        "tokens_per_tile": TOKENS_PER_TILE,
    }


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    """The start, and the weights after one step on one rank, with and without SMAR."""
    from tests.models import build_hf_model

    folder = tmp_path_factory.mktemp("layouts")
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder / "vision")
    torch.save(make_batch(), folder / "batch.pt")
    flags = [*SMALL_MODEL, *DESCENT, "--vision-model", folder / "vision"]
    whole = [*flags, "--micro-batch-size", 4]
    program = Path("tests/distributed/one_step.py")
    run(program, "-", folder / "start", "--only-save", *whole, ranks=1)
    whole += ["--load", folder / "start", "--finetune"]
    run(program, folder / "batch.pt", folder / "smar", *whole, *SMAR, ranks=1)
    run(program, folder / "batch.pt", folder / "none", *whole, ranks=1)
    step = "iter_0000001"
    return {
        "folder": folder,
        "flags": flags,
        "start": load_weights(folder / "start" / step),
        "smar": load_weights(folder / "smar" / step),
        "none": load_weights(folder / "none" / step),
    }


def gradients(one_rank: dict, after: dict) -> dict:
    return {name: one_rank["start"][name] - weight for name, weight in after.items() if weight.is_floating_point()}


def test_smar_moves_the_routers_and_their_biases(one_rank):
    """The reference itself: without this, equal gradients below could all be without SMAR's part."""
    smar, none = gradients(one_rank, one_rank["smar"]), gradients(one_rank, one_rank["none"])
    for name in smar:
        if "router" in name:
            assert (smar[name] - none[name]).abs().max() > 1e-4, f"SMAR has no gradient in {name}"
        if name.startswith("vision_model"):
            assert smar[name].abs().max() == 0, f"{name} is frozen"
    assert smar["connector.linear_1.weight"].abs().max() > 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_that_of_one_rank_with_the_whole_batch(one_rank, layout):
    folder = one_rank["folder"]
    save = folder / layout.replace(" ", "_")
    flags = [*one_rank["flags"], *LAYOUTS[layout], "--load", folder / "start", "--finetune"]
    run("tests/distributed/one_step.py", folder / "batch.pt", save, *flags, *SMAR, ranks=2)
    expected = gradients(one_rank, one_rank["smar"])
    found = gradients(one_rank, load_weights(save / "iter_0000001"))
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        # float32: the sums are taken in another order, and weights of size 1 are subtracted.
        tolerance = 2e-5 * float(gradient.abs().max()) + 3e-7
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
