# SPDX-License-Identifier: Apache-2.0
"""The trainer's model in EleutherAI's lm-evaluation-harness, under its parallel layout.

The harness runs on rank 0 alone: it reads the tasks, builds the prompts and computes the metrics. What it asks the
model is sent to all ranks, which share the work. Tokens, truncation and stop sequences are those of the harness's own
`hf` model, so that a checkpoint and its export give the same numbers.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerFast

from megatron_smar.conversion.processor import TrainedTokenizer, trained_tokenizer
from megatron_smar.data.batch import EncodedSample
from megatron_smar.evaluation.evaluator import Evaluator, text_sample
from megatron_smar.evaluation.generation import generate
from megatron_smar.evaluation.language.task_config import TaskError
from megatron_smar.evaluation.language.task_run import LanguageTasks

# What the harness's `hf` model generates at most where a task sets no limit.
MAX_NEW_TOKENS = 256
# Sent to the ranks at a time, which limits their memory.
REQUESTS = 8192


@dataclass(frozen=True)
class Likelihoods:
    """Asks for the likelihood of continuations.

    Attributes:
        requests: Token ids of each context and continuation.
        max_length: Largest number of positions; longer contexts lose their beginning.
    """

    requests: Sequence[tuple[list[int], list[int]]]
    max_length: int

    def run(self, evaluator: Evaluator, tokenizer: PreTrainedTokenizerFast) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, and whether greedy decoding gives it.

        Continuations that differ in their last token alone, such as the letters of multiple choice, share a pass.
        """
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (context, continuation) in enumerate(self.requests):
            together[(len(continuation), *context, *continuation[:-1])].append(number)
        groups = list(together.values())
        samples = [self._sample(*self.requests[group[0]]) for group in groups]
        endings = [[self.requests[number][1][-1] for number in group] for group in groups]
        scores = evaluator.score_endings(samples, endings, "log-likelihood")
        found = {
            number: (-score.loss, score.exact)
            for group, ends in zip(groups, scores, strict=True)
            for number, score in zip(group, ends, strict=True)
        }
        return [found[number] for number in range(len(self.requests))]

    def _sample(self, context: list[int], continuation: list[int]) -> EncodedSample:
        ids = torch.tensor((context + continuation)[-self.max_length - 1 :])
        mask = torch.zeros(len(ids) - 1)
        mask[-len(continuation) :] = 1
        return text_sample(ids[:-1], ids[1:], mask)


@dataclass(frozen=True)
class Continuations:
    """Asks for greedy continuations.

    Attributes:
        prompts: Token ids of each prompt.
        limits: Largest number of new tokens of each.
        until: Stop sequences of each.
        end_ids: Tokens that end every continuation.
    """

    prompts: Sequence[list[int]]
    limits: Sequence[int]
    until: Sequence[Sequence[str]]
    end_ids: Sequence[int]

    def run(self, evaluator: Evaluator, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
        """Returns the new token ids of each prompt."""
        samples = [text_sample(torch.tensor(ids)) for ids in self.prompts]
        # A token has at least one byte, so that this many tokens contain a stop sequence that has just been completed.
        tails = [max((len(stop.encode()) for stop in stops), default=0) + 4 for stops in self.until]

        def is_complete(number: int, new: list[int]) -> bool:
            if new[-1] in self.end_ids:
                return True
            text = tokenizer.decode(new[-tails[number] :], skip_special_tokens=False)
            return any(stop in text for stop in self.until[number])

        return generate(evaluator, samples, self.limits, is_complete)


class Ranks:
    """Lets rank 0 use the model of all ranks.

    Args:
        evaluator: This rank's part of the model.
        tokenizer: The run's tokenizer.
    """

    def __init__(self, evaluator: Evaluator, tokenizer: PreTrainedTokenizerFast) -> None:
        self.evaluator, self.tokenizer, self._at_work = evaluator, tokenizer, False
        # The other ranks wait while rank 0 prepares tasks and computes metrics, which may take hours.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def ask(self, job: Likelihoods | Continuations) -> Any:
        """Runs a job on all ranks and returns its result; called by rank 0."""
        self._at_work = True
        dist.broadcast_object_list([job], src=0, group=self._group)
        found = job.run(self.evaluator, self.tokenizer)
        self._at_work = False
        return found

    def serve(self) -> None:
        """Runs the jobs of rank 0 until it releases this rank; called by the other ranks."""
        while True:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, src=0, group=self._group)
            if received[0] is None:
                return
            received[0].run(self.evaluator, self.tokenizer)

    def release(self) -> None:
        """Lets the other ranks return from `serve`; called by rank 0, and of no use after an error within a job."""
        if self._at_work:
            return
        dist.broadcast_object_list([None], src=0, group=self._group)


class TrainedModel(TemplateLM):
    """The harness's view of the trainer's model; on rank 0.

    Args:
        ranks: All ranks' model.
        tokenizer: The run's tokenizer.
        max_length: The model's largest number of positions.
    """

    def __init__(self, ranks: Ranks, tokenizer: TrainedTokenizer, max_length: int) -> None:
        super().__init__()
        self.ranks, self.tokenizer, self.max_length = ranks, tokenizer.fast, max_length
        self.end_ids = tuple(tokenizer.end_ids)
        self._images = frozenset(tokenizer.encoder.image_tokens.placeholder_ids)

    def check(self, tasks: LanguageTasks) -> None:
        """Refuses tasks that this model cannot do, before any of them is run.

        Raises:
            TaskError: A task asks for sampling, or for more new tokens than the model has positions.
        """
        for item in tasks.scored():
            for task in item.tasks:
                if task.OUTPUT_TYPE == "generate_until":
                    self._limit(task.task_name, dict(task.config.generation_kwargs or {}))

    def _limit(self, name: str, asked: dict[str, Any]) -> int:
        """Returns a task's largest number of new tokens."""
        settings = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
        limit = int(settings["max_gen_toks"])
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise TaskError(
                f"{name} asks for sampling, but answers are decoded greedily here: evaluate an export (--export)."
            )
        if limit >= self.max_length:
            raise TaskError(
                f"{name} asks for {limit} new tokens, but the model has {self.max_length} positions "
                "(--max-position-embeddings): leave the task out."
            )
        return limit

    @property
    def fast(self) -> PreTrainedTokenizerFast:
        """The tokenizer."""
        assert isinstance(self.tokenizer, PreTrainedTokenizerFast)
        return self.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-sentence token."""
        return int(self.fast.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context."""
        bos = self.fast.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes the harness's cached prompts."""
        return self.fast.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns a text's token ids, with the tokenizer's own beginning-of-sentence token unless the text has it."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, str(self.fast.decode(self.prefix_token_id)))
        ids = list(self.fast.encode(string, add_special_tokens=add_special_tokens))
        if not self._images.isdisjoint(ids):
            raise TaskError(f"a task's text spells out the placeholder of a picture: {string[:200]!r}; leave it out.")
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the text of a prompt."""
        template = partial(
            self.fast.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(template(chat_history))
        except TemplateError:  # as the harness does for templates without a system turn
            return str(template([turn for turn in chat_history if turn["role"] != "system"]))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [(context, continuation) for _, context, continuation in requests]
        for _, continuation in asked:
            if not 0 < len(continuation) <= self.max_length:
                raise TaskError(
                    f"a task's answer has {len(continuation)} tokens, and the model {self.max_length} positions "
                    "(--max-position-embeddings): leave the task out."
                )
        self._report_cut(sum(len(c) + len(a) > self.max_length + 1 for c, a in asked), len(asked))
        found: list[tuple[float, bool]] = []
        for start in range(0, len(asked), REQUESTS):
            found += self.ranks.ask(Likelihoods(asked[start : start + REQUESTS], self.max_length))
        return found

    def _report_cut(self, number: int, of: int) -> None:
        """Says how many prompts lose their beginning, which usually is instruction and examples."""
        if number:
            print(
                f"{number:,} of {of:,} prompts are longer than the model's {self.max_length} positions and lose their "
                "beginning; fewer examples (--num-fewshot) may fit.",
                flush=True,
            )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, in windows of `max_length` tokens without overlap."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(part)) for part in parts]
        totals = [0.0] * len(requests)
        for (number, _, _), (likelihood, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy continuations, up to their first stop sequence.

        Raises:
            TaskError: A task asks for sampling, or for more new tokens than the model has positions.
        """
        limits = [self._limit("a task", dict(request.args[1])) for request in requests]
        settings = [normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS) for request in requests]
        eos = str(self.fast.decode(self.eot_token_id, skip_special_tokens=False))
        until = [[*setting["until"], *([] if eos in setting["until"] else [eos])] for setting in settings]
        whole = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        prompts = [ids[-(self.max_length - limit) :] for ids, limit in zip(whole, limits, strict=True)]
        self._report_cut(sum(map(operator.ne, whole, prompts)), len(prompts))
        answers: list[list[int]] = []
        for start in range(0, len(prompts), REQUESTS):
            part = slice(start, start + REQUESTS)
            answers += self.ranks.ask(Continuations(prompts[part], limits[part], until[part], self.end_ids))
        return [
            postprocess_generated_text(str(self.fast.decode(ids, skip_special_tokens=True)), stops, None)
            for ids, stops in zip(answers, until, strict=True)
        ]


@contextmanager
def _folder_of(tokenizer: Path) -> Any:
    """Yields a folder with a tokenizer, which may be one file."""
    if tokenizer.is_dir():
        yield tokenizer
        return
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").symlink_to(tokenizer.resolve())
        yield Path(scratch)


def run_tokenizer(args: Any) -> TrainedTokenizer:
    """Returns a run's tokenizer as transformers will read it from an export.

    Args:
        args: The run's arguments.

    Raises:
        ValueError: There is no such tokenizer, or it would give other ids than the trainer.
    """
    with _folder_of(Path(args.tokenizer_model)) as folder:
        found = trained_tokenizer(folder, args)
    if found is None:
        raise ValueError(f"--tokenizer-model {args.tokenizer_model} holds no tokenizer that transformers can read.")
    return found
