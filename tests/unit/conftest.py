# SPDX-License-Identifier: Apache-2.0
"""Fixtures: checkpoints that the trainer saved, one for each form of the optimizer's state, and an import."""

from pathlib import Path

import pytest

STEPS = 2
FORMS = {
    "plain": [],
    "sharded": ["--use-distributed-optimizer"],
    "as stored": ["--use-distributed-optimizer", "--no-dist-ckpt-optim-fully-reshardable"],
    "weights": ["--no-save-optim"],
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Returns a --save folder with the checkpoints of two steps, made by one process, for each of `FORMS`."""
    import torch

    from tests.distributed.batches import IMAGE, ROWS, make_batch
    from tests.distributed.cases import COMMON, SMAR
    from tests.distributed.laboratory import read_values, run_jobs
    from tests.models import build_hf_model

    root = tmp_path_factory.mktemp("trained")
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(root / "vision")
    torch.save(make_batch("mixed"), root / "batch.pt")
    flags = [*COMMON, *SMAR, "--optimizer", "adam", "--lr", "1e-3", "--train-iters", str(STEPS), "--save-interval", "1"]
    flags += ["--global-batch-size", str(ROWS), "--micro-batch-size", str(ROWS), "--vision-model", str(root / "vision")]
    folders = {form: root / form.replace(" ", "_") for form in FORMS}
    jobs = [
        {
            "batches": [str(root / "batch.pt")],
            "folder": str(folders[form]),
            "save_before": False,
            "dtype": "float32",
            "flags": [*flags, *more],
        }
        for form, more in FORMS.items()
    ]
    run_jobs(jobs, 1, root / "jobs.json")
    for folder in folders.values():
        assert len(read_values(folder)) == STEPS
    return folders


IMAGE_TOKEN = 127


@pytest.fixture(scope="session")
def hf(tmp_path_factory) -> Path:
    """Returns a composite model's folder (InternVL with Mixtral) as transformers saves it."""
    from tests.models import build_hf_model

    folder = tmp_path_factory.mktemp("composite") / "hf"
    build_hf_model(image_token_id=IMAGE_TOKEN).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def imported(tmp_path_factory, hf, single_rank) -> Path:
    """Returns the checkpoint that the composite model `hf` is imported to."""
    from megatron_smar.conversion.importer import write_model
    from megatron_smar.conversion.sources import read_composite

    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    write_model(read_composite(hf), folder)
    return folder
