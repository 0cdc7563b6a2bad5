# SPDX-License-Identifier: Apache-2.0
"""Which language benchmarks are run, and how: the paper's eight as a preset, and any other task of the harness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PRESET = "smar"


class TaskError(ValueError):
    """A task cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class PresetTask:
    """How this project runs one of the harness's tasks.

    Attributes:
        task: Name in the harness.
        title: Name in the paper.
        shots: Number of examples in each prompt.
        metric: Main metric and filter, as the harness names them.
        version: The harness's version of the task with which this project was tested.
        chat_template: Whether the prompts are conversations.
        reason: Why these choices, where there are others.
    """

    task: str
    title: str
    shots: int
    metric: str
    version: str
    chat_template: bool = False
    reason: str = ""


# Without a chat template, since the model before training, with which all others are compared, has none.
SMAR_TASKS = (
    PresetTask("mmlu", "MMLU", 5, "acc,none", "2"),
    PresetTask("ceval-valid", "C-Eval", 5, "acc,none", "2.0", reason="the answers of the test split are not published"),
    PresetTask(
        "gsm8k_cot",
        "GSM8K",
        8,
        "exact_match,flexible-extract",
        "3.0",
        reason="the eight worked examples of Wei et al. (2022) are part of the task; the last number counts, as in "
        "OpenCompass",
    ),
    PresetTask("bbh", "BBH", 3, "exact_match,get-answer", "3.0", reason="with the worked examples of Suzgun et al."),
    PresetTask("arc_challenge", "ARC-Challenge", 25, "acc_norm,none", "1.0", reason="as in the Open LLM Leaderboard"),
    PresetTask("mbpp", "MBPP", 3, "pass_at_1,none", "1.0"),
    PresetTask("humaneval", "HumanEval", 0, "pass@1,create_test", "1.0"),
    PresetTask(
        "ifeval",
        "IFEval",
        0,
        "prompt_level_strict_acc,none",
        "4.0",
        True,
        "its prompts are instructions to a chat model",
    ),
)
PRESET_TASKS = {item.task: item for item in SMAR_TASKS}


@dataclass(frozen=True)
class LanguageConfig:
    """What is evaluated.

    Attributes:
        tasks: Names of the harness's tasks, groups and tags; "smar" stands for the paper's eight.
        folder: Folder with the data sets, `ORG/NAME` as on the hub; None: the harness downloads what it needs.
        allow_code_execution: Whether code that the model wrote may be run.
        num_fewshot: Number of examples for tasks outside the preset; None: the task's own.
        chat_template: Whether prompts are conversations; None: only those of the preset that say so.
        limit: Evaluate only so many questions of each task, or this share of them if below 1; for trials.
        task_files: Folder with further task files (YAML) in the harness's format, its `--include_path`.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    allow_code_execution: bool = False
    num_fewshot: int | None = None
    chat_template: bool | None = None
    limit: float | None = None
    task_files: Path | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise TaskError(f"--tasks names no task; the paper's are --tasks {PRESET}.")
        if self.folder is not None and not self.folder.is_dir():
            raise TaskError(f"{self.folder} is not a folder; the data sets of --tasks are expected in it.")
        if self.task_files is not None and not self.task_files.is_dir():
            raise TaskError(f"{self.task_files} is not a folder; further task files are expected in it.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise TaskError(f"The number of examples is {self.num_fewshot}; it must be 0 or more.")
        if self.limit is not None and self.limit <= 0:
            raise TaskError(f"The limit is {self.limit:g} questions; it must be more than 0.")

    @property
    def names(self) -> list[str]:
        """The tasks, with the preset replaced by what it stands for, each once."""
        expanded = [list(PRESET_TASKS) if name == PRESET else [name] for name in self.tasks]
        return list(dict.fromkeys(name for names in expanded for name in names))

    def shots(self, name: str, own: int | None) -> int:
        """Returns the number of examples for a task.

        Args:
            name: The name under which it was requested.
            own: The task's own number, None if its file has none.
        """
        if name in PRESET_TASKS:
            return PRESET_TASKS[name].shots
        # As in the harness: a task that says 0 is not made for examples.
        return own or 0 if self.num_fewshot is None or own == 0 else self.num_fewshot

    def uses_chat(self, name: str) -> bool:
        """Returns whether a task's prompts are conversations."""
        preset = name in PRESET_TASKS and PRESET_TASKS[name].chat_template
        return preset if self.chat_template is None else self.chat_template
