# SPDX-License-Identifier: Apache-2.0
"""A pool of processes for the study's runs; the stages that runs share are done before the runs that need them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from grid import Run
from tqdm import tqdm

from runs import Study

Task = Run | tuple[str, int]  # a run, or the model and seed of the stages that runs share


def task(study: Study, item: Task) -> str | None:
    """Does a run, or the stages that runs share; returns what failed."""
    if not isinstance(item, Run):
        study.make_base(item)
        return None
    return study.run(item).get("failed")


def ready(todo: list[Task], done: set[tuple[str, int]]) -> Task | None:
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


def run_here(study: Study, runs: Sequence[Run], processes: int, hours: float) -> int:
    """Does runs in a pool of processes, with a progress bar.

    Args:
        study: The study.
        runs: The runs, in order.
        processes: How many are done at a time.
        hours: No run begins after this time.

    Returns:
        How many failed.
    """
    todo, done, failures = ordered(runs), set[tuple[str, int]](), 0
    deadline = time.monotonic() + 3600 * hours
    running: dict[Future[str | None], Task] = {}
    context = get_context("fork")  # this process has no threads, and forks need not import everything again
    with (
        tqdm(total=len(runs), unit="run", smoothing=0) as bar,
        ProcessPoolExecutor(processes, context) as pool,
    ):
        while todo or running:
            while todo and len(running) < processes and time.monotonic() < deadline:
                item = ready(todo, done)
                if item is None:
                    break
                running[pool.submit(task, study, item)] = item
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                if not isinstance(item, Run):
                    done.add(item)
                    future.result()
                    continue
                bar.update()
                if failed := future.result():
                    failures += 1
                    bar.write(f"{item.name} failed: {failed}")
    return failures
