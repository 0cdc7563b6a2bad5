# SPDX-License-Identifier: Apache-2.0
"""An export in lmms-eval itself, on POPE from local files, answers as its checkpoint does in tools/evaluate.py.

LMMS_EVAL_PYTHON names a Python interpreter that has lmms-eval, in an environment of its own: lmms-eval's requirements
exclude this project's. docs/evaluation.md says how to make one. These tests were written with lmms-eval 0.7.3.
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_smar.evaluation.benchmarks.base import Question
from megatron_smar.evaluation.benchmarks.common import SHORT_ANSWER
from megatron_smar.evaluation.benchmarks.pope import CATEGORIES, POPE
from tests.functional.conftest import COLOURS, World
from tests.functional.test_convert import PROGRAM, language, parts
from tests.launch import run, users_environment

PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not Path(PYTHON).is_file(),
    reason="LMMS_EVAL_PYTHON does not name a Python interpreter that has lmms-eval",
)
TASKS = dict(zip(CATEGORIES, ("pope_random", "pope_pop", "pope_adv"), strict=True))
TILES = 4  # the trainer's --max-tiles; lmms-eval's own default is 12
# In which pictures the small model is taught to see an object.
OBJECTS = {"dog": ("red", "white"), "cat": ("blue",), "bus": ("green", "blue", "red")}
TRAINING = f"""
    --micro-batch-size 8 --global-batch-size 8 --train-iters 150 --save-interval 150 --lr 1e-2
    --lr-decay-style constant --eval-iters 0 --num-workers 0 --log-interval 50 --seq-length 128 --seed 7
    --tokenizer-type SentencePieceTokenizer --max-tiles {TILES} --use-thumbnail
""".split()
# The class that the export names, and flags of the import and of the training.
KINDS: dict[str, tuple[str, list[str], list[str]]] = {
    "plain": ("InternVLForConditionalGeneration", ["--connector", "internvl"], ["--no-modality-router-bias"]),
    "modality-aware": (
        "ModalityAwareInternVLForConditionalGeneration",
        [],
        "--modality-routing smar --smar-d-min 3 --smar-d-max 4 --smar-coeff 0.1".split(),
    ),
}
# lmms-eval's model classes and their arguments, as in docs/evaluation.md.
CLASSES = {"internvl_hf": f"device=cpu,device_map=cpu,max_patches={TILES}", "lfm2_5_vl": "device=cpu"}


@dataclass(frozen=True)
class Model:
    """A trained model and its answers in tools/evaluate.py.

    Attributes:
        export: Its export.
        predictions: Its answer to each of POPE's questions, by key.
        metrics: Its metrics in percent.
    """

    export: Path
    predictions: dict[str, str]
    metrics: dict[str, float]


def question(thing: str) -> str:
    return f"Is there a {thing} in the image?"


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes POPE as published, with pictures of one to four tiles; some labels are not what the model was taught."""
    folder = tmp_path_factory.mktemp("data") / "pope"
    (folder / "val2014").mkdir(parents=True)
    sizes = ((32, 32), (96, 32), (40, 30), (64, 64))
    names = {}
    for number, (colour, size) in enumerate(zip(COLOURS, sizes, strict=True)):
        names[colour] = f"COCO_val2014_{number:012d}.jpg"
        Image.new("RGB", size, COLOURS[colour]).save(folder / "val2014" / names[colour])
    generator = random.Random(3)
    for category in CATEGORIES:
        records = []
        for colour, name in names.items():
            for thing, seen in OBJECTS.items():
                label = ("no", "yes")[(colour in seen) ^ (generator.random() < 0.2)]
                place = {"question_id": len(records) + 1, "image": name}
                records.append(place | {"text": question(thing), "label": label})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"coco_pope_{category}.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def hub_copy(pope: Path) -> Path:
    """Writes the same records in the layout of lmms-eval's POPE on the hub; returns the folder of its organization."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    features = Features(
        {name: Value("string") for name in ("id", "question_id", "question", "answer", "image_source")}
        | {"image": Picture(), "category": Value("string")}
    )
    folder = pope.parent / "hub" / "lmms-lab-encoder" / "POPE"
    (folder / "Full").mkdir(parents=True)
    for category in CATEGORIES:
        rows = []
        for line in (pope / f"coco_pope_{category}.json").read_text().splitlines():
            record = json.loads(line)
            picture = {"bytes": (pope / "val2014" / record["image"]).read_bytes(), "path": None}
            values = [len(rows), record["question_id"], record["text"], record["label"], record["image"]]
            texts = dict(zip(features, map(str, values), strict=False))
            rows.append(texts | {"image": picture, "category": category})
        Dataset.from_list(rows, features=features).to_parquet(folder / "Full" / f"{category}-00000-of-00001.parquet")
    splits = "".join(f"  - split: {name}\n    path: Full/{name}-*\n" for name in CATEGORIES)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: Full\n  data_files:\n{splits}---\n")
    return folder.parents[1]


@pytest.fixture(scope="module")
def shards(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepares questions like POPE's, with the answers that the model is taught."""
    root = tmp_path_factory.mktemp("taught")
    records = [
        {
            "id": f"{colour}-{thing}",
            "image": f"{colour}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question(thing)}{SHORT_ANSWER}"},
                {"from": "gpt", "value": "yes" if colour in seen else "no"},
            ],
        }
        for colour in COLOURS
        for thing, seen in OBJECTS.items()
    ]
    (root / "train.json").write_text(json.dumps(4 * records))
    command = ["--train", root / "train.json", "--image-root", world.root, "--output", root / "shards"]
    run("tools/data/prepare.py", *command, "--samples-per-shard", 10)
    return root / "shards"


@pytest.fixture(scope="module")
def model_of(
    world: World, shards: Path, pope: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Model]:
    """Returns a function that makes a model of a kind with the project's programs, once for all tests."""

    @cache
    def make(kind: str) -> Model:
        name, imported, trained = KINDS[kind]
        root = tmp_path_factory.mktemp(kind)
        mixtral = language("mixtral", root / "mixtral", num_local_experts=4, num_experts_per_tok=2)
        start, checkpoint, export = root / "start", root / "trained", root / "export"
        run(PROGRAM, "import", *parts(world, mixtral), *imported, "--output", start)
        given = ["--vision-model", start / "hf", *(start / "flags.txt").read_text().split()]
        data = ["--tokenizer-model", start / "hf" / "tokenizer.model", "--data-path", shards]
        place = ["--load", start, "--finetune", "--save", checkpoint]
        run("pretrain_vlm.py", *TRAINING, *given, *trained, *data, *place, ranks=1, timeout=480)
        asked = ["--benchmarks", "pope", "--benchmarks-data", pope.parent, "--output", root / "results.json"]
        run("tools/evaluate.py", "--load", checkpoint, *asked, ranks=1)
        run(PROGRAM, "export", "--load", checkpoint, "--hf", start / "hf", "--output", export)
        assert json.loads((export / "config.json").read_text())["architectures"] == [name]
        lines = (root / "results" / "pope.jsonl").read_text().splitlines()[1:]
        predictions = {record["key"]: record["prediction"] for record in map(json.loads, lines)}
        metrics = json.loads((root / "results.json").read_text())["benchmarks"]["pope"]["metrics"]
        return Model(export, predictions, metrics)

    return make


def without_second_bos(export: Path, copy: Path) -> Path:
    """Copies an export for lmms-eval, whose model classes put a BOS before the one that the chat template wrote."""
    shutil.copytree(export, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    return copy


def prompt_ids(export: Path, picture: Path, text: str, rendered: bool) -> list[int]:
    """Returns a question's token ids from an export's processor, for the messages or for their rendered text."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(export)
    with Image.open(picture) as file:
        image = file.convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
    if rendered:  # as lmms-eval does
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return processor(images=[image], text=[prompt])["input_ids"][0]
    return processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ][0]


def lmms_eval(name: str, export: Path, hub: Path, output: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Runs lmms-eval on POPE, offline; returns its results by task, and its samples by our keys."""
    environment = users_environment()
    environment.pop("PYTHONPATH", None)
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= offline | {"HF_HOME": str(output / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        str(Path(PYTHON).absolute()),
        "-m",
        "lmms_eval",
        "eval",
        "--model",
        name,
        "--tasks",
        "pope_full",
        "--batch_size",
        "1",
    ]
    command += ["--model_args", f"pretrained={export},{CLASSES[name]}", "--log_samples", "--output_path", str(output)]
    done = subprocess.run(command, cwd=hub, env=environment, capture_output=True, text=True, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "pope_f1_score" in done.stdout, said[-6000:]
    assert "Error" not in said, said[-6000:]  # it catches errors of generate() and continues with empty answers
    (results,) = output.rglob("*_results.json")
    samples = {}
    for category, task in TASKS.items():
        (path,) = output.rglob(f"*_samples_{task}.jsonl")
        for sample in map(json.loads, path.read_text().splitlines()):
            samples[f"{category}/{sample['pope_accuracy']['question_id']}"] = sample
    return json.loads(results.read_text())["results"], samples


@pytest.mark.parametrize(
    ("kind", "name"), [("plain", "internvl_hf"), ("plain", "lfm2_5_vl"), ("modality-aware", "lfm2_5_vl")]
)
def test_an_export_in_lmms_eval_gives_the_checkpoints_answers_and_scores(
    kind: str, name: str, model_of: Callable[[str], Model], pope: Path, hub_copy: Path, tmp_path: Path
) -> None:
    model = model_of(kind)
    copy = without_second_bos(model.export, tmp_path / "copy")
    results, samples = lmms_eval(name, copy, hub_copy, tmp_path / "output")
    prompts = {sample.key: sample.prompt for sample in POPE(pope).read() if isinstance(sample, Question)}
    assert {key: sample["input"] for key, sample in samples.items()} == prompts
    assert {key: sample["filtered_resps"] for key, sample in samples.items()} == model.predictions
    for category, task in TASKS.items():
        for metric in ("accuracy", "precision", "recall", "f1"):
            theirs = results[task][f"pope_{'f1_score' if metric == 'f1' else metric},none"]
            assert 100 * theirs == pytest.approx(model.metrics[f"{metric}/{category}"]), (task, metric)
    assert 0 < model.metrics["f1"] < 100, "the comparison would show nothing"
    dogs = {text for key, text in model.predictions.items() if question("dog") in prompts[key]}
    assert dogs == {"yes", "no"}, "the answers do not depend on the picture"


def test_lmms_eval_would_put_a_second_bos_before_the_prompt(
    model_of: Callable[[str], Model], pope: Path, tmp_path: Path
) -> None:
    export, picture = model_of("plain").export, next((pope / "val2014").iterdir())
    copy = without_second_bos(export, tmp_path / "copy")
    trained = prompt_ids(export, picture, question("dog"), rendered=False)
    assert prompt_ids(export, picture, question("dog"), rendered=True) == [trained[0], *trained]
    assert prompt_ids(copy, picture, question("dog"), rendered=True) == trained
