# SPDX-License-Identifier: Apache-2.0
"""A pool of processes for the study's runs; the stages that runs share are done before the runs that need them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from grid import Base, Run
from steps import StepError
from tqdm import tqdm

from runs import Study

FAILURES_IN_A_ROW = 3  # of runs: then the machine is more likely at fault than the arms
Task = Run | Base  # a run, or the stages that the runs of a model and seed share


def task(study: Study, item: Task, retry: bool) -> tuple[str | None, bool]:
    """Does a run, or the stages that runs share; returns why it failed, and whether it was done now."""
    try:
        if isinstance(item, Run):
            result, is_new = study.run(item, retry)
            return result.get("failed"), is_new
        study.backbone.make(item)
    except StepError as error:
        return str(error), True
    return None, True


def ready(todo: list[Task], done: set[Base]) -> Task | None:
    """Takes the first task whose stage 1 is there out of the list; None if all wait for theirs."""
    for number, item in enumerate(todo):
        if not isinstance(item, Run) or item.base in done:
            return todo.pop(number)
    return None


def ordered(runs: Sequence[Run]) -> list[Task]:
    """Returns the tasks: the runs in order, each model and seed's stages 0 and 1 while the seed before is running."""
    bases = list(dict.fromkeys(run.base for run in runs))
    tasks: list[Task] = [*bases[:2]]
    for number, base in enumerate(bases):
        own = [run for run in runs if run.base == base]
        tasks += [*own[:1], *bases[number + 2 : number + 3], *own[1:]]
    return tasks


def run_here(study: Study, runs: Sequence[Run], processes: int, hours: float, retry: bool) -> int:
    """Does runs in a pool of processes, with a progress bar.

    Args:
        study: The study.
        runs: The runs, in order.
        processes: How many are done at a time.
        hours: No run begins after this time.
        retry: Whether runs that failed are done again.

    Returns:
        How many failed, with those that have no result because a stage that they share failed. After
        `FAILURES_IN_A_ROW` no run begins.
    """
    todo, done, failures, in_a_row = ordered(runs), set[Base](), 0, 0
    deadline = time.monotonic() + 3600 * hours
    running: dict[Future[tuple[str | None, bool]], Task] = {}
    tqdm.monitor_interval = 0  # no thread: processes are forked from this one
    # Forks need not import everything again.
    with (
        tqdm(total=len(runs), unit="run", smoothing=0) as bar,
        ProcessPoolExecutor(processes, get_context("fork")) as pool,
    ):
        while todo or running:
            while todo and len(running) < processes and time.monotonic() < deadline:
                item = ready(todo, done)
                if item is None:
                    break
                running[pool.submit(task, study, item, retry)] = item
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item, (failed, is_new) = running.pop(future), future.result()
                affected = [item] if isinstance(item, Run) else []
                if not isinstance(item, Run):
                    done.add(item)
                    if failed:  # says nothing about the arms: their runs stay missing
                        affected = [run for run in todo if isinstance(run, Run) and run.base == item]
                        todo = [run for run in todo if run not in affected]
                bar.update(len(affected))
                for run in affected if failed else ():
                    failures += 1
                    bar.write(f"{run.name} failed: {failed}")
                if isinstance(item, Run) and is_new:
                    in_a_row = in_a_row + 1 if failed else 0
                if todo and in_a_row >= FAILURES_IN_A_ROW:
                    bar.write(f"{in_a_row} runs failed in a row, so no more are begun; --retry does them again.")
                    todo = []
    return failures
