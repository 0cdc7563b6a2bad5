# SPDX-License-Identifier: Apache-2.0
"""The round trip from and to Hugging Face: import, train, evaluate, export, verify."""

from __future__ import annotations

import math
import re

from tests.gpu.context import Context, Findings
from tests.gpu.files import SMAR, make_language_model, training_flags
from tests.gpu.programs import Program, read_json, run, run_together
from tests.gpu.training import BF16

CONVERT = "tools/checkpoint/convert.py"
VERIFY = 1e-4  # difference of a logit: both models compute in float32 on the host, from the same bf16 weights


def round_trip(context: Context, findings: Findings) -> None:
    """The step `tools`: conversion on the host, training and evaluation on the device."""
    folder, files = context.folder, context.files
    start, trained, exported = (folder / name for name in ("start", "trained", "exported"))
    make_language_model(folder / "language", files / "tokenizer")
    source = ["--language", folder / "language", "--vision", files / "vision", "--connector", "internvl"]
    run(context, Program("import", [CONVERT, "import", *source, "--output", start], "cpu"))
    model = [*(start / "flags.txt").read_text().split(), *SMAR, *_data_flags(context)]
    load = ["--load", start, "--finetune", "--no-load-optim", "--no-load-rng"]
    steps = [*BF16, "--lr", "1e-3", "--train-iters", "3", "--save-interval", "3", "--save", trained]
    run(context, Program("train", ["pretrain_vlm.py", *model, *load, *steps], context.device))
    evaluate = Program("evaluate", ["tools/evaluate.py", "--load", trained, *_held_out(context)], context.device)
    export = Program(
        "export", [CONVERT, "export", "--load", trained, "--hf", start / "hf", "--output", exported], "cpu"
    )
    run_together(context, [evaluate, export])
    pictures = ["--image", files / "red.png"]
    verify = [CONVERT, "verify", "--hf", exported, "--load", trained, "--tolerance", VERIFY, *pictures]
    output = run(context, Program("verify", verify, "cpu"))
    _read_results(context, findings, output)


def _data_flags(context: Context) -> list[str]:
    """Returns the flags of data and training; the model's flags come from the import."""
    flags = training_flags(context.files)
    start = flags.index("--data-path")
    hf = context.folder / "start" / "hf"
    given = flags[start:]
    for name in ("--vision-model", "--tokenizer-model"):
        given[given.index(name) + 1] = str(hf)
    return given


def _held_out(context: Context) -> list[object]:
    files = context.files
    texts = ["--text", files / "text.jsonl", "--vqa", files / "vqa.json", "--image-root", files, "--examples", 2]
    return [*texts, "--output", context.folder / "results.json"]


def _read_results(context: Context, findings: Findings, verified: str) -> None:
    results = read_json(context.folder / "results.json")
    for name in ("text_perplexity", "vqa_accuracy"):
        findings.require(math.isfinite(results[name]), f"{name} is {results[name]}")
        findings.note(name, round(results[name], 4))
    distances = results["mrd_distance_by_layer"]
    findings.finite("distances", distances)
    findings.note("distances", " ".join(f"{distance:.3f}" for distance in distances))
    found = re.search(r"largest absolute logit difference\s+(\S+)", verified)
    findings.require(found is not None, "verify printed no difference")
    if found:
        findings.at_most("verify: logit difference", float(found[1]), VERIFY)
