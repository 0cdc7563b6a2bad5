# SPDX-License-Identifier: Apache-2.0
"""The trainer's model in EleutherAI's lm-evaluation-harness, under its parallel layout.

The harness runs on rank 0 alone: it reads the tasks, builds the prompts and computes the metrics. What it asks the
model is sent to all ranks, which share the work. Tokens, truncation and stop sequences are those of the harness's own
`hf` model, so that a checkpoint and its export give the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerFast

from megatron_smar.conversion.processor import TrainedTokenizer, trained_tokenizer
from megatron_smar.data.batch import EncodedSample
from megatron_smar.evaluation.evaluator import Evaluator
from megatron_smar.evaluation.generation import generate

# What the harness's `hf` model generates at most where a task sets no limit.
MAX_NEW_TOKENS = 256


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
        return _text_sample(ids[:-1], ids[1:], mask)


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
        samples = [_text_sample(ids, ids, torch.zeros(len(ids))) for ids in map(torch.tensor, self.prompts)]
        # A token has at least one byte, so that this many tokens contain a stop sequence that has just been completed.
        tails = [max((len(stop.encode()) for stop in stops), default=0) + 4 for stops in self.until]

        def is_complete(number: int, new: list[int]) -> bool:
            if new[-1] in self.end_ids:
                return True
            text = tokenizer.decode(new[-tails[number] :], skip_special_tokens=False)
            return any(stop in text for stop in self.until[number])

        return generate(evaluator, samples, self.limits, is_complete)


def _text_sample(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> EncodedSample:
    tiles = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return EncodedSample(
        __key__="", __restore_key__=(), input_ids=ids, labels=labels, loss_mask=mask, pixel_values=tiles
    )


class Ranks:
    """Lets rank 0 use the model of all ranks.

    Args:
        evaluator: This rank's part of the model.
        tokenizer: The run's tokenizer.
    """

    def __init__(self, evaluator: Evaluator, tokenizer: PreTrainedTokenizerFast) -> None:
        self.evaluator, self.tokenizer = evaluator, tokenizer
        # The other ranks wait while rank 0 prepares tasks and computes metrics, which may take hours.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def ask(self, job: Likelihoods | Continuations) -> Any:
        """Runs a job on all ranks and returns its result; called by rank 0."""
        dist.broadcast_object_list([job], src=0, group=self._group)
        return job.run(self.evaluator, self.tokenizer)

    def serve(self) -> None:
        """Runs the jobs of rank 0 until it releases this rank; called by the other ranks."""
        while True:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, src=0, group=self._group)
            if received[0] is None:
                return
            received[0].run(self.evaluator, self.tokenizer)

    def release(self) -> None:
        """Lets the other ranks return from `serve`; called by rank 0."""
        dist.broadcast_object_list([None], src=0, group=self._group)


class TrainedModel(TemplateLM):
    """The harness's view of the trainer's model; on rank 0.

    Args:
        ranks: All ranks' model.
        tokenizer: The run's tokenizer, with its chat template.
        end_ids: Tokens that end an answer.
        max_length: The model's largest number of positions.
    """

    def __init__(
        self, ranks: Ranks, tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int], max_length: int
    ) -> None:
        super().__init__()
        self.ranks, self.tokenizer = ranks, tokenizer
        self.end_ids, self.max_length = tuple(end_ids), max_length

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
        return list(self.fast.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the text of a prompt."""
        return str(
            self.fast.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [(context, continuation) for _, context, continuation in requests]
        return list(self.ranks.ask(Likelihoods(asked, self.max_length)))

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
            ValueError: A task asks for sampling, or for more new tokens than the model has positions.
        """
        settings = [normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS) for request in requests]
        if any(setting.get("do_sample") and setting.get("temperature", 1.0) > 0 for setting in settings):
            raise ValueError(
                "a task asks for sampling, but answers are decoded greedily here: evaluate an export (--export)."
            )
        limits = [int(setting["max_gen_toks"]) for setting in settings]
        if max(limits, default=0) >= self.max_length:
            raise ValueError(
                f"a task asks for {max(limits)} new tokens, but the model has {self.max_length} positions "
                "(--max-position-embeddings)."
            )
        eos = str(self.fast.decode(self.eot_token_id, skip_special_tokens=False))
        until = [[*setting["until"], *([] if eos in setting["until"] else [eos])] for setting in settings]
        prompts = [
            self.tok_encode(request.args[0])[-(self.max_length - limit) :]
            for request, limit in zip(requests, limits, strict=True)
        ]
        answers = self.ranks.ask(Continuations(prompts, limits, until, self.end_ids))
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
