# SPDX-License-Identifier: Apache-2.0
"""A converted checkpoint gives transformers' logits under every layout, and its export equals the original.

Every architecture is imported with the converter's code, with a vision tower and a newly initialized connector, loaded
with the trainer's initialization under each layout, and exported again. One launch of two ranks runs all of them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architectures import FIRST, VOCABULARY, build_hf, composite_source, sample_ids
from tests.distributed.cases import EP, PP, TP_SP
from tests.launch import run

DENSE = {"TP 2": "--tensor-model-parallel-size 2 --sequence-parallel", "PP 2": PP}
MOE = {"TP 2": TP_SP, "PP 2": PP, "EP 2": EP, "TP 2 x EP 2": f"{TP_SP} {EP}"}
HAS_EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
OFTEN = ("mixtral", "qwen3_moe", "phi")  # the recipes'; the others are in `make test-matrix`


def marked(kind: str, *more: str) -> Any:
    """Returns an architecture as a parameter."""
    return pytest.param(kind, *more, marks=[] if kind in OFTEN else pytest.mark.matrix)


RUNS = [marked(kind, name) for kind in FIRST for name in (MOE if kind in HAS_EXPERTS else DENSE)]
IMAGE = VOCABULARY - 1  # the placeholder, which does not occur in text


def import_model(hf: Any, tower: Path, folder: Path) -> None:
    """Writes a language model as a checkpoint, as convert.py does; its vocabulary already has the image tokens."""
    from megatron_smar.conversion.importer import write_model

    write_model(composite_source(hf, tower, folder / "language"), folder / "checkpoint")


@pytest.fixture(scope="module")
def laboratory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, single_rank: Any
) -> tuple[Path, dict[str, Tensor]]:
    """Returns a folder with each architecture's checkpoint and logits under every layout, and transformers' logits."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    folder = tmp_path_factory.mktemp("conversion")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    tower = InternVLVisionConfig(**sizes, image_size=[32, 32], patch_size=[8, 8])
    InternVLVisionModel(tower).save_pretrained(folder / "tower")
    ids, expected = sample_ids() % IMAGE, {}
    torch.save(ids, folder / "ids.pt")
    wanted = [item.callspec.params for item in request.session.items if item.path == request.path]
    for kind in dict.fromkeys(params["kind"] for params in wanted):
        hf = build_hf(FIRST[kind])
        with torch.no_grad():
            expected[kind] = hf(input_ids=ids).logits
        import_model(hf, folder / "tower", folder / kind)
    jobs = [
        {
            "checkpoint": str(folder / kind / "checkpoint"),
            "layout": (MOE if kind in HAS_EXPERTS else DENSE)[layout],
            "ids": str(folder / "ids.pt"),
            "logits": str(folder / kind / f"{layout}.pt"),
        }
        for kind, layout in ((params["kind"], params["layout"]) for params in wanted if "layout" in params)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run("tests/distributed/converted.py", folder / "jobs.json", ranks=2, idle=120)
    return folder, expected


@pytest.mark.parametrize(("kind", "layout"), RUNS)
def test_an_imported_model_gives_transformers_logits_under_each_layout(laboratory, kind: str, layout: str) -> None:
    folder, expected = laboratory
    found = torch.load(folder / kind / f"{layout}.pt")
    assert found.shape[-1] == VOCABULARY + (layout.startswith("TP")), "the vocabulary is padded for tensor parallelism"
    torch.testing.assert_close(found[..., :VOCABULARY], expected[kind], atol=1e-4, rtol=0)
    assert expected[kind].std() > 0.3


@pytest.mark.parametrize("kind", map(marked, FIRST))
def test_an_exported_model_is_bit_identical_to_the_imported_one(laboratory, kind: str) -> None:
    from megatron_smar.checkpoint.safetensors_io import read_folder
    from megatron_smar.conversion.exporter import export_model

    folder = laboratory[0] / kind
    export_model(folder / "checkpoint", folder / "checkpoint" / "hf", folder / "exported")
    found, stored = read_folder(folder / "exported"), read_folder(folder / "language")
    language = {name.removeprefix("language_model.") for name in found if name.startswith("language_model.")}
    assert language == set(stored)
    for name, tensor in stored.items():
        there = found["language_model." + name]
        assert there.dtype == tensor.dtype and torch.equal(there.read(), tensor.read()), name
