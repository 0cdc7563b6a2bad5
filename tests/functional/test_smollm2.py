# SPDX-License-Identifier: Apache-2.0
"""examples/smollm2_moe as a user runs it, reduced to a few steps (--quick): with the published weights, and offline."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.demo_sources import sources, write_sources
from tests.launch import ROOT, run
from tests.models import write_language

RUN = "examples/smollm2_moe/run.py"
VARIANTS = ("smar", "balance", "none")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a small language model, made without a network."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_sources(folder / "sources")
    write_language(folder / "language")
    example(folder)
    return folder


def example(folder: Path, *flags: object, check: bool = True):
    places = ["--output", folder / "run", "--cache", folder / "sources", "--language", folder / "language"]
    return run(RUN, "--quick", "--without-tasks", *places, *flags, timeout=1800, check=check)


def settings(stage: Path) -> dict[str, object]:
    """Returns the flags that a stage was started with."""
    content = yaml.safe_load((stage / "run.yaml").read_text())
    return {name: value for group in content.values() for name, value in group.items()}


@pytest.mark.matrix
def test_the_export_of_the_import_is_the_language_model_that_was_imported(root):
    agreement = json.loads((root / "run/export/agreement.json").read_text())
    assert agreement["identical"] == agreement["weights"] > 0 and agreement["difference"] < 1e-5
    assert agreement["agreeing"] == agreement["positions"] > 0
    for step in ("verify", "upcycle"):  # the mixture computes the same as the dense model
        assert "greedy tokens that agree" in (root / f"run/{step}/verify.txt").read_text()


@pytest.mark.matrix
def test_the_variants_of_stage_3_differ_in_their_losses_alone(root):
    rows = json.loads((root / "run/results/results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["before stage 3", *VARIANTS]
    assert all(row["language"] is None for row in rows)
    flags = {name: settings(root / f"run/stage3_{name}") for name in VARIANTS}
    assert len({str(of["load"]) for of in flags.values()}) == 1
    assert all(of["freeze"] == "vision connector embeddings attention norms dense".split() for of in flags.values())
    losses = {name: [of["modality-routing"], of["moe-router-load-balancing-type"]] for name, of in flags.items()}
    assert losses == {"smar": ["smar", "aux_loss"], "balance": ["none", "aux_loss"], "none": ["none", "none"]}
    assert (flags["smar"]["smar-d-min"], flags["smar"]["smar-d-max"], flags["smar"]["smar-coeff"]) == (1, 1.5, 0.01)
    for row in rows[1:]:
        result = json.loads((root / f"run/evaluation_{row['name']}/results.json").read_text())
        assert row["pictures"] == result["vqa_accuracy"] and len(result["mrd_distance_by_layer"]) == 2  # of 4 layers


@pytest.mark.matrix
def test_what_is_done_is_not_run_again_and_the_log_has_the_time_left(root):
    said = example(root).stdout
    assert "stage3_smar: done before" in said and " ...\n" not in said
    log = (root / "run/progress.log").read_text()
    assert "stage3_none; about " in log and "evaluation_none done in " in log


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--quick", "--write", "page.md"], "--write takes the results of full runs: leave out --quick"),
        (["--full"], "--full is for a GPU, on the CPU it takes days: set MEGATRON_SMAR_DEVICE=cuda, or leave it out"),
    ],
)
def test_wrong_flags_are_one_sentence_before_anything_runs(flags, sentence):
    done = run(RUN, *flags, check=False, rank={"MEGATRON_SMAR_DEVICE": "cpu"})
    assert done.returncode == 2 and sentence in done.stdout and "..." not in done.stdout


@pytest.mark.matrix
def test_the_published_weights_are_fetched_trained_and_evaluated(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("lm_eval")
    sys.path.insert(0, str(ROOT / "examples" / "smollm2_moe"))
    from weights import SMOLLM2

    cache = ROOT / "runs/sources"
    try:
        sources.fetch(cache, (SMOLLM2, sources.OPENMOJI))
    except sources.SourceError as error:
        pytest.skip(str(error))
    run(RUN, "--quick", "--output", tmp_path / "run", "--cache", cache, timeout=3600)
    agreement = json.loads((tmp_path / "run/export/agreement.json").read_text())
    assert agreement["identical"] == agreement["weights"] == 272
    table = json.loads((tmp_path / "run/results/retention.json").read_text())
    assert list(table["after"]) == list(VARIANTS) and table["average_before"]["value"] > 0
