# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding with Megatron's key-value cache, over all data-parallel ranks.

Megatron's static context has one position for all rows of a batch. So a batch first reads as many tokens of each prompt
as the shortest prompt has. From there on every pass reads one token of each row: the prompt's next one as long as there
is one, then the most likely one. No row is padded, and no attention mask is needed, so that any attention kernel
computes the same as without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from tqdm import tqdm

from megatron_smar.data.batch import EncodedSample
from megatron_smar.evaluation.evaluator import Evaluator
from megatron_smar.routing.modalities import PADDING, TEXT

# Number of the prompt, and its new tokens so far -> whether the continuation is complete.
IsComplete = Callable[[int, list[int]], bool]


def generate(
    evaluator: Evaluator,
    prompts: Sequence[EncodedSample],
    limits: Sequence[int],
    is_complete: IsComplete,
    name: str = "generation",
) -> list[list[int]]:
    """Continues prompts with the most likely tokens; data-parallel ranks share the work, and all return all results.

    Args:
        evaluator: Holds the model; its `batch_size` is the number of prompts that a rank decodes together.
        prompts: The prompts; their `input_ids` are continued.
        limits: Largest number of new tokens of each prompt.
        is_complete: Ends a continuation; the last token belongs to the result.
        name: Name of the progress bar.

    Returns:
        The new token ids of each prompt.
    """
    group = evaluator.groups.dp
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].input_ids))
    mine = order[group.rank() :: group.size()]
    new = generate_own(
        evaluator,
        [prompts[number] for number in mine],
        [limits[number] for number in mine],
        lambda place, ids: is_complete(mine[place], ids),
        name,
    )
    gathered: list[dict[int, list[int]]] = [{}] * group.size()
    dist.all_gather_object(gathered, dict(zip(mine, new, strict=True)), group=group)
    merged = {number: ids for part in gathered for number, ids in part.items()}
    return [merged[number] for number in range(len(prompts))]


def generate_own(
    evaluator: Evaluator,
    prompts: Sequence[EncodedSample],
    limits: Sequence[int],
    is_complete: IsComplete,
    name: str | None = None,
) -> list[list[int]]:
    """Continues the prompts of this replica; every rank calls it, also one without prompts.

    Args:
        evaluator: As for `generate`.
        prompts: This replica's prompts, the same on all its ranks.
        limits: As for `generate`.
        is_complete: As for `generate`.
        name: Name of the progress bar; None for none.

    Returns:
        The new token ids of each of this replica's prompts.
    """
    batches = plan_batches(
        [len(prompt.input_ids) for prompt in prompts],
        [_end_of_images(prompt, evaluator.placeholders) for prompt in prompts],
        evaluator.batch_size,
    )
    # Ranks that share experts must make equally many passes: those with fewer batches continue a prompt of no tokens.
    missing = int(evaluator.most_of_replicas(len(batches))) - len(batches)
    found: dict[int, list[int]] = {}
    show = name is not None and dist.get_rank() == 0
    with decoding_settings(evaluator.model), InferenceMode.active(), torch.no_grad():
        for batch in tqdm(batches + [[]] * missing, desc=name, unit="batch", disable=not show, mininterval=2):
            mine = {number: Row(prompts[number], limits[number]) for number in batch}
            rows = Rows(evaluator, list(mine.values()) or [Row(evaluator.idle_sample(), 0)])
            rows.decode([partial(is_complete, number) for number in mine])
            found |= {number: row.new for number, row in mine.items()}
    return [found[number] for number in range(len(prompts))]


def plan_batches(lengths: Sequence[int], ends_of_images: Sequence[int], size: int) -> list[list[int]]:
    """Returns the numbers of the prompts that are decoded together, the longest first, so that memory fails early.

    Args:
        lengths: Number of tokens of each prompt.
        ends_of_images: Position after each prompt's last vision token. It is at most the length of the batch's shortest
            prompt, because a pass of one token has no pictures.
        size: Largest number of prompts of a batch.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if not batches or len(batches[-1]) == size or lengths[batches[-1][0]] < ends_of_images[number]:
            batches.append([])
        batches[-1].append(number)
    return batches[::-1]


@contextmanager
def decoding_settings(model: torch.nn.Module) -> Iterator[None]:
    """Turns off, in all layers, what decoding cannot use.

    A single token cannot be divided among tensor-parallel ranks (sequence parallelism), and Megatron 0.19.2 has no
    fused rotary embedding with a cache for multi-latent attention.
    """
    candidates: list[Any] = [part for module in model.modules() for part in (module, getattr(module, "config", None))]
    owners = {id(part): part for part in candidates}.values()
    changed = [(part, "sequence_parallel") for part in owners if getattr(part, "sequence_parallel", False) is True]
    changed += [
        (part, "apply_rope_fusion")
        for part in owners
        if getattr(part, "multi_latent_attention", False) and getattr(part, "apply_rope_fusion", False) is True
    ]
    for part, name in changed:
        setattr(part, name, False)
    try:
        yield
    finally:
        for part, name in changed:
            setattr(part, name, True)


class Row:
    """A prompt and its continuation.

    Args:
        prompt: The prompt.
        limit: Largest number of new tokens; 0 for a row that is only passed along.
    """

    def __init__(self, prompt: EncodedSample, limit: int) -> None:
        self.prompt, self.limit = prompt, limit
        self.ids: list[int] = prompt.input_ids.tolist()
        self.length = len(self.ids)
        self.complete = limit == 0

    @property
    def new(self) -> list[int]:
        """The continuation."""
        return self.ids[self.length :]


class Rows:
    """The prompts that this rank decodes together, with their cache; used under Megatron's `InferenceMode`.

    Args:
        evaluator: Holds the model.
        rows: The prompts.
    """

    def __init__(self, evaluator: Evaluator, rows: Sequence[Row]) -> None:
        self.evaluator, self.rows = evaluator, rows
        self.device = next(evaluator.model.parameters()).device
        # One more than is needed: a rank that waits for the others repeats its last position.
        self.cache = StaticInferenceContext(len(rows), max(row.length + row.limit for row in rows) + 1)

    @property
    def position(self) -> int:
        """Number of tokens in the cache, the same for all rows."""
        return self.cache.sequence_len_offset

    def decode(self, is_complete: Sequence[Callable[[list[int]], bool]]) -> None:
        """Decodes until the rows of all replicas are complete."""
        tokens = self.read_common_part()
        while True:
            for place in self.take(tokens):
                row = self.rows[place]
                row.complete = len(row.new) == row.limit or is_complete[place](row.new)
            if not self._any_replica_continues():
                return
            tokens = self.read_next_tokens()

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Appends the most likely tokens to the rows whose prompt has been read, and returns the places of these."""
        taken = []
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if not row.complete and len(row.ids) == self.position:
                row.ids.append(token)
                taken.append(place)
        return taken

    def _any_replica_continues(self) -> bool:
        """Whether a row of any replica is not complete: ranks that share experts must make equally many passes."""
        return self.evaluator.most_of_replicas(not all(row.complete for row in self.rows)) > 0

    def read_common_part(self) -> list[int]:
        """Passes the first tokens of all rows through the model, and returns each row's most likely next token."""
        length = min(row.length for row in self.rows)
        samples = []
        for row in self.rows:
            ids = row.prompt.input_ids[:length]
            fields = {"input_ids": ids, "labels": ids, "loss_mask": torch.zeros(length)}
            samples.append(EncodedSample.derive_from(row.prompt, pixel_values=row.prompt.pixel_values, **fields))
        # A rank whose rows are not continued makes passes only for the others: its tokens are not counted.
        _, batch = self.evaluator.prepare(samples, length, counted=not all(row.complete for row in self.rows))
        return self._pass(length, **batch.model_inputs())

    def read_next_tokens(self) -> list[int]:
        """Passes one more token of each row through the model; complete rows have padding, which is not routed."""
        position = self.position
        is_real = [not row.complete for row in self.rows]
        pad = self.evaluator.pad_id
        ids = [row.ids[position] if real else pad for row, real in zip(self.rows, is_real, strict=True)]
        modalities = [TEXT if real else PADDING for real in is_real]
        column = [torch.tensor(values, device=self.device).unsqueeze(1) for values in (ids, modalities)]
        return self._pass(
            int(any(is_real)),
            input_ids=column[0],
            position_ids=torch.full_like(column[0], position),
            modality_ids=column[1],
        )

    def _pass(self, advance: int, **inputs: Any) -> list[int]:
        """Runs the model, moves the cache's end by `advance` and returns the most likely token of each row."""
        logits = self.evaluator.model(**inputs, inference_context=self.cache)
        self.cache.sequence_len_offset += advance
        return logits[:, -1].argmax(dim=-1).tolist()


def _end_of_images(prompt: EncodedSample, placeholders: Sequence[int]) -> int:
    """Returns the position after the prompt's last vision token, 0 without one."""
    where = torch.isin(prompt.input_ids, torch.tensor(placeholders)).nonzero()
    return int(where[-1]) + 1 if len(where) else 0
