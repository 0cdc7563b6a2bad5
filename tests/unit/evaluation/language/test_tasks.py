# SPDX-License-Identifier: Apache-2.0
"""The harness's tasks with data from a folder, run on models that always give the same kind of answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets
from lm_eval.models.dummy import DummyLM

from megatron_smar.evaluation.language.code_execution import CodeExecutionError, check_isolation
from megatron_smar.evaluation.language.local_data import DataError
from megatron_smar.evaluation.language.results import format_results, parse_results
from megatron_smar.evaluation.language.task_config import PRESET_TASKS, SMAR_TASKS, LanguageConfig, TaskError
from megatron_smar.evaluation.language.tasks import _leaves, _manager, load_tasks
from tests import language_data

SOLUTION = "    return a + b\n"


class Answers(DummyLM):
    """Gives the last option the highest likelihood, and one text to every prompt."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text
        self.prompts: list[str] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(float(request.idx), True) for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.text for _ in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path) -> Iterator[None]:
    asked = []

    def refuse(*arguments: Any, **keywords: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    assert not asked, f"the network was asked for {asked}"


@pytest.fixture
def isolation() -> None:
    try:
        check_isolation()
    except CodeExecutionError as error:
        pytest.skip(str(error))


def run(config: LanguageConfig, model: DummyLM) -> dict[str, Any]:
    results = load_tasks(config).run(model)
    assert results is not None
    content = json.loads(json.dumps(results.as_dict()))
    assert parse_results({"language": content}, "a file") == results
    assert format_results(results)
    return content["tasks"]


@pytest.mark.matrix
def test_multiple_choice_from_a_folder_has_score_error_samples_shots_and_version(tmp_path) -> None:
    language_data.mmlu(tmp_path, ["anatomy"])
    language_data.arc(tmp_path)
    tasks = run(LanguageConfig(("mmlu_anatomy", "arc_challenge"), tmp_path), Answers())
    anatomy, arc = tasks["mmlu_anatomy"], tasks["arc_challenge"]
    assert (anatomy["score"], anatomy["samples"], anatomy["version"], anatomy["shots"]) == (1.0, 6, "1.0", 0)
    assert (arc["score"], arc["stderr"], arc["metric"], arc["shots"]) == (1.0, 0.0, "acc_norm,none", 25)


@pytest.mark.matrix
def test_a_group_is_one_score_with_the_presets_shots_in_every_member(tmp_path) -> None:
    leaves = dict(_leaves(_manager(), "mmlu_social_sciences"))
    assert len(leaves) == 12
    language_data.mmlu(tmp_path, [leaf["dataset_name"] for leaf in leaves.values()])
    model = Answers()
    config = LanguageConfig(("mmlu_social_sciences",), tmp_path, num_fewshot=5, limit=2)
    tasks = run(config, model)
    group = tasks["mmlu_social_sciences"]
    assert (group["samples"], group["shots"], group["score"], group["metric"]) == (24, 5, 1.0, "acc,none")
    assert set(group["subtasks"]) == set(leaves)
    assert all(prompt.count("Answer:") == 6 for prompt in model.prompts)


@pytest.mark.slow
def test_the_preset_runs_the_papers_eight_benchmarks_offline(tmp_path, isolation) -> None:
    manager = _manager()
    subjects = {
        name: [leaf["dataset_name"] for _, leaf in _leaves(manager, name)] for name in ("mmlu", "ceval-valid", "bbh")
    }
    assert [len(names) for names in subjects.values()] == [57, 52, 27]
    language_data.mmlu(tmp_path, subjects["mmlu"])
    language_data.ceval(tmp_path, subjects["ceval-valid"])
    language_data.bbh(tmp_path, subjects["bbh"])
    for make in ("gsm8k", "arc", "mbpp", "humaneval", "ifeval"):
        getattr(language_data, make)(tmp_path)
    config = LanguageConfig(("smar",), tmp_path, allow_code_execution=True, limit=2)
    loaded = load_tasks(config)
    table = loaded.table()
    results = loaded.run(Answers("One. Two. So the answer is False.\n"))
    assert results is not None
    tasks = results.tasks
    assert list(tasks) == [item.task for item in SMAR_TASKS]
    for item in SMAR_TASKS:
        result = tasks[item.task]
        assert (result.shots, result.metric, result.version) == (item.shots, item.metric, item.version)
        assert result.stderr is not None and result.chat_template == item.chat_template
        assert f"{item.title} ({item.task})" in table
    assert (tasks["mmlu"].score, tasks["ceval-valid"].score, tasks["ifeval"].score) == (1.0, 0.0, 1.0)
    assert tasks["bbh"].score == 0.5 and tasks["humaneval"].score == 0.0


def test_generated_code_is_scored_by_running_it(tmp_path, isolation) -> None:
    language_data.humaneval(tmp_path)
    language_data.mbpp(tmp_path)
    config = LanguageConfig(("humaneval",), tmp_path, allow_code_execution=True)
    assert run(config, Answers(SOLUTION))["humaneval"]["score"] == 1.0
    assert run(config, Answers("    import sys\n    sys.exit(0)\n"))["humaneval"]["score"] == 0.0
    config = LanguageConfig(("mbpp",), tmp_path, allow_code_execution=True)
    mbpp = run(config, Answers("def add(a, b):\n" + SOLUTION))["mbpp"]
    assert (mbpp["score"], mbpp["metric"], mbpp["shots"]) == (1.0, "pass_at_1,none", 3)


def test_code_is_not_run_without_permission(tmp_path) -> None:
    language_data.humaneval(tmp_path)
    with pytest.raises(CodeExecutionError, match=r"--tasks humaneval would run code .* --allow-code-execution"):
        load_tasks(LanguageConfig(("humaneval",), tmp_path))


def test_a_task_that_would_run_code_outside_of_the_sandbox_is_refused_even_with_permission(tmp_path) -> None:
    with pytest.raises(CodeExecutionError, match=r"--tasks cruxeval_output would run code .* outside"):
        load_tasks(LanguageConfig(("cruxeval_output",), tmp_path, allow_code_execution=True))


def test_ifeval_takes_nltks_data_from_the_folder_and_the_chat_template(tmp_path) -> None:
    language_data.ifeval(tmp_path)
    model = Answers("One. Two.")
    result = run(LanguageConfig(("ifeval",), tmp_path), model)["ifeval"]
    assert (result["score"], result["chat_template"], result["samples"]) == (1.0, True, 2)
    assert model.prompts[0] == "<user>Write two sentences."


def test_chat_template_can_be_chosen_for_all_tasks(tmp_path) -> None:
    language_data.gsm8k(tmp_path)
    model = Answers("The answer is 1.")
    tasks = run(LanguageConfig(("gsm8k_cot",), tmp_path, chat_template=True), model)
    assert tasks["gsm8k_cot"]["chat_template"] is True
    assert model.prompts[0].startswith("<user>") and model.prompts[0].count("<assistant>") == 8
    assert tasks["gsm8k_cot"]["score"] == pytest.approx(1 / 6)


def test_prompts_of_the_same_questions_have_the_same_digest_and_others_another(tmp_path) -> None:
    language_data.gsm8k(tmp_path)

    def digest(**options: Any) -> str:
        return run(LanguageConfig(("gsm8k_cot",), tmp_path, **options), Answers())["gsm8k_cot"]["prompts"]

    assert digest() == digest() != digest(limit=3)
    assert digest() != digest(chat_template=True)


@pytest.mark.matrix
def test_prompts_are_those_of_the_harness_itself_and_the_same_for_each_model(tmp_path) -> None:
    from lm_eval.evaluator import simple_evaluate

    language_data.arc(tmp_path)
    loaded = load_tasks(LanguageConfig(("arc_challenge",), tmp_path))
    first, second, harness = Answers(), Answers(), Answers()
    loaded.run(first)
    loaded.run(second)
    simple_evaluate(harness, tasks=list(loaded.loaded["arc_challenge"]["tasks"].values()), bootstrap_iters=0)
    assert first.prompts == second.prompts == harness.prompts
    assert first.prompts[0].count("Question:") == 26


def test_a_split_that_only_serves_examples_may_be_missing_without_examples(tmp_path) -> None:
    language_data.hellaswag(tmp_path)
    result = run(LanguageConfig(("hellaswag",), tmp_path), Answers())["hellaswag"]
    assert (result["samples"], result["score"], result["metric"]) == (3, 1.0, "acc,none")
    with pytest.raises(DataError, match=r"no file of the split train, which hellaswag reads; .*train\.jsonl"):
        load_tasks(LanguageConfig(("hellaswag",), tmp_path, num_fewshot=3))


def test_an_unknown_task_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(TaskError, match=r"--tasks gsm8 is unknown to lm_eval .*; the nearest names are gsm8k"):
        load_tasks(LanguageConfig(("gsm8",)))


def test_missing_data_sets_are_all_named_with_folder_and_origin(tmp_path) -> None:
    with pytest.raises(DataError) as error:
        load_tasks(LanguageConfig(("gsm8k_cot", "arc_challenge"), tmp_path))
    place = tmp_path / "openai/gsm8k"
    assert f"{place} is not a folder: gsm8k_cot needs the hub's data set openai/gsm8k there" in str(error.value)
    assert f"hf download --repo-type dataset openai/gsm8k --local-dir {place}" in str(error.value)
    assert str(error.value).endswith("Unusable are also: allenai/ai2_arc.")


def test_a_task_written_in_python_reads_the_folder_too(tmp_path) -> None:
    row = {"id": "1", "title": "Tree", "context": "A tree is tall.", "question": "What is tall?"}
    answers = {"answers": {"text": ["a tree"], "answer_start": [0]}}
    language_data.jsonl(tmp_path / "lighteval/squad_v2/validation.jsonl", [row | answers])
    language_data.jsonl(tmp_path / "lighteval/squad_v2/train.jsonl", [row | answers])
    loaded = load_tasks(LanguageConfig(("squadv2",), tmp_path))
    assert [len(task.eval_docs) for item in loaded.scored() for task in item.tasks] == [1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"squadv2 needs the hub's data set lighteval/squad_v2 there"):
        load_tasks(LanguageConfig(("squadv2",), tmp_path / "empty"))


def test_an_incomplete_data_set_is_refused(tmp_path) -> None:
    language_data.mmlu(tmp_path, ["anatomy"])
    (tmp_path / "cais/mmlu/anatomy/dev-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"has no file anatomy/dev-\*, which its README.md lists"):
        load_tasks(LanguageConfig(("mmlu_anatomy",), tmp_path))
    with pytest.raises(DataError, match="lists no config virology"):
        load_tasks(LanguageConfig(("mmlu_virology",), tmp_path))


def test_ifeval_without_nltks_data_is_refused(tmp_path, monkeypatch) -> None:
    import nltk

    language_data.ifeval(tmp_path)
    (tmp_path / "nltk_data").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(DataError, match=r"nltk_data/tokenizers/punkt_tab is not usable: ifeval needs NLTK's"):
        load_tasks(LanguageConfig(("ifeval",), tmp_path))


def test_a_task_and_its_group_are_not_run_together(tmp_path) -> None:
    with pytest.raises(TaskError, match="mmlu_anatomy is part of both mmlu_stem and mmlu_anatomy"):
        load_tasks(LanguageConfig(("mmlu_stem", "mmlu_anatomy"), tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "--tasks names no task"),
        ({"folder": Path("/nonexistent")}, "/nonexistent is not a folder"),
        ({"task_files": Path("/nonexistent")}, "/nonexistent is not a folder"),
        ({"num_fewshot": -1}, "is -1; it must be 0 or more"),
        ({"limit": 0}, "limit is 0 questions; it must be more than 0"),
    ],
)
def test_unusable_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        LanguageConfig(**{"tasks": ("mmlu",)} | options)


def test_the_preset_stands_for_eight_tasks_with_fixed_shots() -> None:
    config = LanguageConfig(("smar", "hellaswag", "mmlu"), num_fewshot=7)
    assert config.names == [*PRESET_TASKS, "hellaswag"]
    assert [config.shots(name, None) for name in config.names] == [5, 5, 8, 3, 25, 3, 0, 0, 7]
    assert config.shots("hellaswag", 0) == 0
