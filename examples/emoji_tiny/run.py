# SPDX-License-Identifier: Apache-2.0
"""The demo: trains a small vision-language MoE on text, then on images, and evaluates it before and after stage 2.

    python examples/emoji_tiny/run.py [--output runs/demo] [--compare]

Every step trains or evaluates with the same programs as a large run (`pretrain_vlm.py`, `tools/evaluate.py`,
`tools/data/prepare.py`). Steps whose results are still valid are skipped; an interrupted stage resumes from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from demo_report import print_table, write_report
from steps import Step, StepError, run_program, source_hash

from megatron_smar.report.scalars import read_scalars

SCRIPTS = Path("examples/emoji_tiny")
RANKS = 2
TEXT_ONLY = 0.025  # share of pure text in stage 2, as in the paper
# Files whose change invalidates results: those that make the data, and those that train.
DATA_CODE = [f"examples/emoji_tiny/{name}.py" for name in ("sources", "corpus", "scenes", "pretrain_vision")]
TRAINING_PACKAGES = ("runtime", "routing", "model", "monitoring", "config", "training", "data")
TRAINING_CODE = [
    "pretrain_vlm.py",
    "megatron_smar/*.py",
    *(f"megatron_smar/{name}/**/*.py" for name in TRAINING_PACKAGES),
]

# The paper's recipe (its Table 7) with batch sizes and learning rates for a small model.
STAGES = ("stage0", "stage1", "stage2")


def settings(name: str) -> dict[str, Any]:
    """Returns the flags of one of the demo's run files, by name."""
    (group,) = yaml.safe_load((ROOT / SCRIPTS / f"{name}.yaml").read_text(encoding="utf-8")).values()
    return group


@dataclass
class Demo:
    """The demo's folders, programs and steps.

    Attributes:
        output: Folder of all results, relative to the project's folder if it is inside it.
        cache: Folder of the downloaded sources.
    """

    output: Path
    cache: Path

    def __post_init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self.data_code = source_hash(ROOT, [*DATA_CODE, "megatron_smar/data/**/*.py"])
        self.training_code = source_hash(ROOT, TRAINING_CODE)

    def program(self, step: str, *command: object, ranks: int = 0) -> None:
        """Runs one of the project's programs, in one process or under torchrun, and records the command."""
        words = [str(word) for word in command]
        launch = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks else ["python"]
        note = self.output / "logs" / f"{step}.command"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(shlex.join([*launch, *words]))
        python = [sys.executable, "-m", "torch.distributed.run", *launch[1:]] if ranks else [sys.executable]
        threads = max(1, (os.cpu_count() or 1) // max(ranks, 1))
        run_program([*python, *words], self.output / "logs" / f"{step}.log", ROOT, threads)

    def step(self, name: str, folder: str, *key: Any) -> Step:
        """Creates a step and registers it by its name, so that its seconds are in the report."""
        self.steps[name] = Step(name, self.output / folder, *key)
        return self.steps[name]

    def prepare_data(self) -> None:
        """Makes sources, language data, images, and shards of all of them."""
        self.step("corpus", "corpus", self.data_code).run(self._make_corpus)
        self.step("scenes", "scenes", self.data_code).run(
            lambda: self.program("scenes", SCRIPTS / "scenes.py", *self._places("scenes"))
        )
        self.step("shards", "shards", self.data_code).run(self._make_shards)

    def _places(self, folder: str) -> list[str | Path]:
        return ["--cache", self.cache, "--output", self.output / folder]

    def _make_corpus(self) -> None:
        self.program("sources", SCRIPTS / "sources.py", "--cache", self.cache)
        self.program("corpus", SCRIPTS / "corpus.py", *self._places("corpus"))

    def _make_shards(self) -> None:
        corpus, scenes, shards = (self.output / name for name in ("corpus", "scenes", "shards"))
        for name, records in {
            "text": corpus / "train.jsonl",
            "captions": scenes / "captions.json",
            "instructions": scenes / "instructions.json",
            "text_instructions": corpus / "text_instructions.json",
        }.items():
            command = ["tools/data/prepare.py", "--train", records, "--image-root", scenes, "--output", shards / name]
            self.program(f"shards_{name}", *command, "--overwrite")
        blend = [(1 - TEXT_ONLY, "instructions"), (TEXT_ONLY, "text_instructions")]
        entries = "".join(f"      - weight: {weight}\n        path: ./{name}\n" for weight, name in blend)
        header = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        (shards / "stage2.yaml").write_text(header + entries)

    def pretrain_vision(self) -> None:
        """Trains the vision encoder, the demo's replacement for InternViT."""
        self.step("vision", "vision", self.steps["scenes"].key).run(
            lambda: self.program("vision", SCRIPTS / "pretrain_vision.py", *self._places("vision"))
        )

    def model_files(self) -> list[str | Path]:
        """Returns the flags for the parts of the model that the demo makes."""
        return ["--vision-model", self.output / "vision", "--tokenizer-model", self.output / "corpus/tokenizer.model"]

    def train(self, name: str, data: str, before: Step | None, **changes: Any) -> Step:
        """Runs one stage: `pretrain_vlm.py` from the checkpoint of the previous step."""
        files = ["model", "optimizer", name.split("_")[0]]
        changed = [word for key, value in changes.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        flags = ["--config", *(SCRIPTS / f"{file}.yaml" for file in files), *self.model_files(), *changed]
        inputs = [self.steps["shards"], self.steps["vision"], *([before] if before else [])]
        key = [settings(file) for file in files]
        step = self.step(name, name, self.training_code, key, flags, [part.key for part in inputs])

        def work() -> None:
            start = ["--load", before.folder, "--finetune"] if before else []  # if interrupted, resumes from --save
            paths = ["--data-path", self.output / "shards" / data, "--save", step.folder]
            logs = ["--tensorboard-dir", step.folder / "tensorboard", "--rejects-dir", step.folder / "rejects"]
            self.program(name, "pretrain_vlm.py", *flags, *paths, *logs, *start, ranks=RANKS)

        return step.run(work)

    def evaluate(self, trained: Step) -> dict[str, Any]:
        """Evaluates a checkpoint on the held-out texts and images."""
        corpus, scenes, name = self.output / "corpus", self.output / "scenes", f"evaluation_{trained.name}"
        evaluator = source_hash(ROOT, ["megatron_smar/commands/evaluate.py", "megatron_smar/evaluation/*.py"])
        step = self.step(name, name, trained.key, evaluator)
        step.run(
            lambda: self.program(
                name,
                *["tools/evaluate.py", "--load", trained.folder, "--output", step.folder / "results.json"],
                *["--conversation-template", "mistral"],  # stage 1 was trained with `plain`, which has no questions
                *["--text", corpus / "held_out.jsonl"],
                *["--vqa", scenes / "vqa_held_out.json", "--image-root", scenes],
                ranks=RANKS,
            )
        )
        return json.loads((step.folder / "results.json").read_text())

    def run(self, compare: bool) -> dict[str, Any]:
        """Runs all steps and returns the report."""
        begin = time.monotonic()
        self.prepare_data()
        self.pretrain_vision()
        stage0 = self.train("stage0", "text", None)
        stage1 = self.train("stage1", "captions", stage0)
        before = self.evaluate(stage1)
        after = self.evaluate(self.train("stage2", "stage2.yaml", stage1))
        other = None
        if compare:
            other = self.evaluate(self.train("stage2_none", "stage2.yaml", stage1, modality_routing="none"))
        print(f"steps done in {time.monotonic() - begin:.0f} s", flush=True)
        return self.report(before, after, other)

    def report(self, before: dict[str, Any], after: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
        """Returns the content of the report page."""
        corpus = json.loads((self.output / "corpus" / "summary.json").read_text())
        items = json.loads((self.output / "scenes" / "vqa_held_out.json").read_text())
        chance = {item["kind"]: item["chance"] for item in items}
        smar = {"d_min": 1.5, "d_max": 2.0, "coeff": 0.01, "eps": 1e-6, "scope": "global"}
        report = {
            "title": "megatron_smar demo: a small MoE learns to see",
            "retention": after["word_accuracy"] / before["word_accuracy"],
            "unigram_perplexity": corpus["unigram_perplexity"],
            "vqa_accuracy": after["vqa_accuracy"],
            "vqa_accuracy_before": before["vqa_accuracy"],
            "vqa_chance": sum(item["chance"] for item in items) / len(items),
            "vqa_by_kind": {k: v | {"chance": chance[k]} for k, v in after["vqa_by_kind"].items()},
            "mrd_distance_by_layer": after["mrd_distance_by_layer"],
            "mrd_distance_by_layer_before": before["mrd_distance_by_layer"],
            "band": [smar["d_min"], smar["d_max"]],
            "steps": {name: settings(name)["train-iters"] for name in STAGES},
            "seconds": self._seconds(),
            "config": {
                **{name: named(settings(name)) for name in ("model", "optimizer", *STAGES)},
                "smar": smar,
                "data": {"text_only_ratio": TEXT_ONLY, "train_tokens": corpus["train_tokens"]},
            },
            "commands": self._commands(),
            "history": {name: self._history(name) for name in STAGES},
            "expert_share": {"before": before["expert_share"], "after": after["expert_share"]},
            "examples": [self._example(item) for item in after["examples"]],
        }
        for name in ("text_perplexity", "word_accuracy"):
            report |= {f"{name}_before": before[name], f"{name}_after": after[name]}
        if other is not None:
            report["comparison"] = [self._comparison("none", before, other), self._comparison("smar", before, after)]
        return report

    def _seconds(self) -> dict[str, float]:
        taken = {name: step.seconds for name, step in self.steps.items()}
        groups = {"data": ("corpus", "scenes", "shards"), "vision": ("vision",)}
        groups |= {name: (name,) for name in STAGES}
        groups["evaluation"] = ("evaluation_stage1", "evaluation_stage2")
        seconds = {name: sum(taken[step] for step in members) for name, members in groups.items()}
        return seconds | {"total": sum(seconds.values())}

    def _history(self, stage: str) -> dict[str, Any]:
        series = read_scalars(self.output / stage / "tensorboard")
        return {
            name: {"steps": list(s.steps), "values": list(s.values)}
            for name, s in series.items()
            if name == "lm loss" or (stage == "stage2" and name.startswith(("smar loss", "mrd distance", "moe/mrd")))
        }

    def _commands(self) -> list[str]:
        """Returns the command of every program, in the order of their last runs."""
        notes = sorted((self.output / "logs").glob("*.command"), key=lambda path: path.stat().st_mtime)
        return [path.read_text() for path in notes]

    def _example(self, item: dict[str, Any]) -> dict[str, Any]:
        return {
            "image": self.output / "scenes" / item["image"][0],
            "question": item["question"].replace("<image>\n", ""),
            "answer": item["answer"],
            "prediction": item["prediction"],
            "correct": item["prediction"] == item["answer"],
        }

    def _comparison(self, routing: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        distances = after["mrd_distance_by_layer"]
        return {
            "routing": routing,
            "retention": after["word_accuracy"] / before["word_accuracy"],
            "vqa_accuracy": after["vqa_accuracy"],
            "text_perplexity_after": after["text_perplexity"],
            "mrd_distance": sum(distances) / len(distances),
        }


def named(flags: dict[str, Any]) -> dict[str, Any]:
    """Settings by names without dashes, for the report."""
    return {name.replace("-", "_"): value for name, value in flags.items()}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="results (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("runs/sources"), help="sources (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="also train stage 2 without SMAR, and compare")
    options = parser.parse_args()
    os.chdir(ROOT)
    try:
        report = Demo(options.output, options.cache).run(options.compare)
    except StepError as error:
        sys.exit(f"demo: {error}")
    write_report(report, options.output)
    print_table(report)
    print(f"\nreport: {options.output / 'report.html'}")


if __name__ == "__main__":
    main()
