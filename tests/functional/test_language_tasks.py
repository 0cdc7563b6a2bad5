# SPDX-License-Identifier: Apache-2.0
"""Language tasks of lm-evaluation-harness: a checkpoint under its layouts, and its export, give the same numbers."""

import json
import shutil
from pathlib import Path

import pytest

from tests.functional.conftest import World
from tests.functional.test_convert import PROGRAM, TOKENS, language, parts
from tests.language_data import jsonl
from tests.launch import run, run_each_rank

EXPERTS = ["--expert-model-parallel-size", "2", "--conversation-template", "mistral"]
TASKS = {
    # One letter after the same context: all choices share a pass.
    "letters": """
        output_type: multiple_choice
        doc_to_text: "{{question}}\\nA. red\\nB. blue\\nAnswer:"
        doc_to_choice: ["A", "B"]
        doc_to_target: answer
        num_fewshot: 2
        fewshot_split: test
        metric_list: [{metric: acc}, {metric: brier_score}]""",
    # Answers of several tokens, and of different lengths.
    "phrases": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: ["the Licensor", "a copy of this License and its notices", "red"]
        doc_to_target: answer
        metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]""",
    "texts": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]""",
    # The answers are compared through their length and their characters.
    "answers": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: ter}, {metric: chrf}]""",
    "chats": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {until: [], max_gen_toks: 7, do_sample: false}
        metric_list: [{metric: ter}, {metric: chrf}]""",
    "essays": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {until: [], max_gen_toks: 500, do_sample: false}
        metric_list: [{metric: chrf}]""",
}
SHORT = [name for name in TASKS if name not in ("chats", "essays")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a data set and task files."""
    folder = tmp_path_factory.mktemp("tasks")
    sentences = (Path(__file__).resolve().parents[2] / "LICENSE").read_text().split(".")[3:13]
    rows = [
        {"question": f"{' '.join(text.split())[:60]}?", "answer": number % 2, "text": " ".join(text.split())}
        for number, text in enumerate(sentences)
    ]
    jsonl(folder / "data" / "own" / "license" / "test.jsonl", rows)
    (folder / "files").mkdir()
    for name, content in TASKS.items():
        lines = [line.strip() for line in content.strip().splitlines()]
        lines += [f"task: {name}", "dataset_path: own/license", "test_split: test", "metadata: {version: 1}"]
        (folder / "files" / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def imported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the import of a mixture of experts whose random weights are large, so that its choices are clear."""
    folder = tmp_path_factory.mktemp("imported")
    model = language("mixtral", folder / "mixtral", TOKENS - 3, num_local_experts=4, num_experts_per_tok=2)
    run(PROGRAM, "import", *parts(world, model), "--output", folder / "start")
    return folder / "start"


def tasks(data: Path, *names: str) -> list[object]:
    return ["--tasks", *names, "--tasks-data", data / "data", "--task-files", data / "files"]


def measured(path: Path) -> dict[str, dict[str, float]]:
    found = json.loads(path.read_text())["language"]["tasks"]
    return {
        name: {key: value for key, value in task["metrics"].items() if value is not None} | {"prompts": task["prompts"]}
        for name, task in found.items()
    }


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys() != set()
    for name, metrics in one.items():
        assert metrics.pop("prompts") == two[name].pop("prompts") is not None
        assert metrics == pytest.approx(two[name], rel=2e-4)


@pytest.mark.matrix
def test_a_checkpoint_and_its_export_give_the_same_numbers_under_every_layout(imported, data, tmp_path):
    given = ["tools/evaluate.py", "--load", imported, "--float32", "--conversation-template", "mistral"]
    given += [*tasks(data, *SHORT), "--batch-size", 3]
    said = run(*given, "--output", tmp_path / "one.json", ranks=1).stdout
    assert "letters" in said and "log-likelihood" in said
    layout = ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-model-parallel-size", 2]
    layout += ["--expert-tensor-parallel-size", 1]
    run(*given, *layout, "--output", tmp_path / "tensor.json", ranks=2)
    run(*given, "--expert-model-parallel-size", 2, "--output", tmp_path / "experts.json", ranks=2)
    run(PROGRAM, "export", "--load", imported, "--hf", imported / "hf", "--output", tmp_path / "export")
    export = ["--export", tmp_path / "export", "--batch-size", 3, *tasks(data, *SHORT)]
    run("tools/evaluate.py", *export, "--output", tmp_path / "export.json")
    for name in ("tensor", "experts", "export"):
        same(measured(tmp_path / "one.json"), measured(tmp_path / f"{name}.json"))


@pytest.mark.matrix
def test_the_language_model_that_was_imported_gets_other_prompts_or_scores_than_its_import(imported, data, tmp_path):
    """Its vocabulary lacks the image tokens, so that probabilities differ slightly, but no choice does."""
    original = shutil.copytree(imported.parent / "mixtral", tmp_path / "original")
    run(PROGRAM, "export", "--load", imported, "--hf", imported / "hf", "--output", tmp_path / "export")
    for file in (tmp_path / "export").glob("tokenizer*"):  # the model was saved without one
        shutil.copy(file, original)
    asked = tasks(data, "letters", "phrases")
    native = ["--load", imported, "--float32", "--conversation-template", "mistral"]
    run("tools/evaluate.py", *native, *asked, "--output", tmp_path / "import.json", ranks=1)
    run("tools/evaluate.py", "--export", original, *asked, "--output", tmp_path / "original.json")
    one, two = (measured(tmp_path / f"{name}.json") for name in ("original", "import"))
    for name, metric in (("letters", "acc,none"), ("phrases", "acc,none"), ("phrases", "acc_norm,none")):
        assert one[name]["prompts"] == two[name]["prompts"] is not None
        assert one[name][metric] == two[name][metric]


@pytest.mark.matrix
def test_prompts_as_conversations_are_those_of_the_export(imported, data, tmp_path):
    given = ["--load", imported, "--float32", "--conversation-template", "mistral", "--chat-template"]
    run("tools/evaluate.py", *given, *tasks(data, "chats"), "--output", tmp_path / "one.json", ranks=1)
    run(PROGRAM, "export", "--load", imported, "--hf", imported / "hf", "--output", tmp_path / "export")
    export = ["--export", tmp_path / "export", "--chat-template", *tasks(data, "chats")]
    run("tools/evaluate.py", *export, "--output", tmp_path / "export.json")
    same(measured(tmp_path / "one.json"), measured(tmp_path / "export.json"))


@pytest.mark.matrix
def test_tasks_that_cannot_be_loaded_are_refused_before_the_model_is(imported, data, tmp_path):
    given = ["tools/evaluate.py", "--load", imported, "--output", tmp_path / "results.json"]
    for wrong, message in (
        (tasks(data, "leters"), "letters"),
        (["--tasks", "arc_easy", "--tasks-data", data / "data"], "allenai/ai2_arc"),
        (["--tasks", "humaneval", "--tasks-data", data / "data"], "--allow-code-execution"),
    ):
        (done,) = run_each_rank(*given, *wrong, ranks=1, check=False)
        assert done.returncode != 0 and message in done.stdout
        assert "building VisionLanguageModel" not in done.stdout and "Traceback" not in done.stdout


@pytest.mark.matrix
def test_a_task_that_asks_too_much_of_the_model_is_refused_before_any_other_runs(imported, data, tmp_path):
    given = ["tools/evaluate.py", "--load", imported, "--output", tmp_path / "results.json"]
    done = run_each_rank(*given, *EXPERTS, *tasks(data, "letters", "essays"), ranks=2, check=False)
    assert all(rank.returncode != 0 for rank in done[:1])
    assert "essays asks for 500 new tokens, but the model has 128 positions" in done[0].stdout
    assert "log-likelihood" not in done[0].stdout and "Traceback" not in done[0].stdout
