# SPDX-License-Identifier: Apache-2.0
"""Likelihood, exact answers and greedy decoding on held-out samples, over all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from megatron_smar.data.batch import EncodedSample, VisionLanguageBatch, collate
from megatron_smar.model.vlm import VisionLanguageModel
from megatron_smar.training.batch import ModelBatch, prepare_batch

# Positions whose logits are in float32 at once: of a vocabulary of 150,000, 0.6 GB where a whole batch has many.
_POSITIONS = 1024


@dataclass(frozen=True)
class Score:
    """How the model does on one sample's target tokens.

    Attributes:
        loss: Sum of the cross-entropy, in nats.
        tokens: Number of target tokens.
        exact: Whether each target token is the most likely one, that is, whether greedy decoding gives them exactly.
        words: Words among the targets that go on after their first piece.
        words_completed: Those whose further pieces are all the most likely ones.
    """

    loss: float
    tokens: int
    exact: bool
    words: int = 0
    words_completed: int = 0


class Evaluator:
    """Runs a whole model (no pipeline) on encoded samples.

    Args:
        model: Without wrappers; it is put into evaluation mode.
        placeholders: Token ids of the placeholders, one for each kind of images, in the order of the modalities.
        tokens_per_tile: Vision tokens per tile.
        pad_id: Fills rows.
        multiple_of: The sequence length is rounded up to a multiple of it (sequence parallelism).
        batch_size: Samples per forward pass.
        continues_word: [vocabulary] bool, the pieces that go on with a word; None leaves words uncounted.

    Raises:
        ValueError: The model is only a pipeline stage, or the context is split.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        placeholders: Sequence[int],
        tokens_per_tile: int,
        pad_id: int,
        multiple_of: int = 1,
        batch_size: int = 32,
        continues_word: Tensor | None = None,
    ) -> None:
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        if self.groups.pp.size() > 1 or self.groups.cp.size() > 1:
            raise ValueError(
                "evaluation runs without pipeline and context parallelism: leave out --pipeline-model-parallel-size "
                "and --context-parallel-size; the checkpoint loads under any layout."
            )
        self.model = model.eval()
        self.placeholders, self.tokens_per_tile, self.pad_id = placeholders, tokens_per_tile, pad_id
        self.multiple_of, self.batch_size = multiple_of, batch_size
        self.continues_word = continues_word

    def score(self, samples: Sequence[EncodedSample], name: str) -> list[Score]:
        """Scores every sample; each data-parallel rank takes its share, and all get all results, in order."""
        rank, size = self.groups.dp.rank(), self.groups.dp.size()
        share = -(-len(samples) // size)
        # Every rank makes equally many forward passes of one size, or the experts' exchange would wait for ever.
        mine = [samples[(rank * share + i) % len(samples)] for i in range(share)]
        scores: list[Score] = []
        starts = range(0, share, self.batch_size)
        for start in tqdm(starts, desc=name, unit="batch", disable=dist.get_rank() > 0, mininterval=2):
            scores += self._score_batch(mine[start : start + self.batch_size])
        gathered: list[list[Score]] = [[]] * size
        dist.all_gather_object(gathered, scores, group=self.groups.dp)
        return [score for part in gathered for score in part][: len(samples)]

    def _score_batch(self, samples: list[EncodedSample]) -> list[Score]:
        logits, batch, placed = self._logits(samples)
        losses, hit = _loss_and_hit(logits, placed.labels)
        mask = batch.loss_mask > 0
        continues = torch.zeros_like(mask)
        if self.continues_word is not None:
            continues = self.continues_word.cpu()[batch.labels] & mask
        return [
            Score(float(loss[m].sum()), int(m.sum()), bool(h[m].all()), *_completed_words(c.tolist(), h.tolist()))
            for loss, h, m, c in zip(losses, hit, mask, continues, strict=True)
        ]

    @torch.no_grad()
    def _logits(self, samples: list[EncodedSample]) -> tuple[Tensor, VisionLanguageBatch, ModelBatch]:
        """Logits [b, s, vocabulary] as the model gives them, and the batch, on the host and on the device."""
        longest = max(len(sample.input_ids) for sample in samples)
        length = -(-longest // self.multiple_of) * self.multiple_of
        host = collate([[sample] for sample in samples], num_rows=len(samples), length=length, pad_id=self.pad_id)
        batch = prepare_batch(host, self.placeholders, self.tokens_per_tile, True, self.groups)
        logits = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            modality_ids=batch.modality_ids,
            pixel_values=batch.pixel_values,
            vision_index=batch.vision_index,
        )
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.groups.tp)
        return logits, host, batch

    def generate(self, prompts: Sequence[EncodedSample], max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """Greedy continuations of prompts (their `input_ids`), every rank all of them.

        Returns:
            The new ids of each, without the stop token.
        """
        current = [prompt.input_ids.tolist() for prompt in prompts]
        lengths = [len(ids) for ids in current]
        for _ in range(max_new_tokens):
            rows = [
                EncodedSample.derive_from(
                    prompt,
                    input_ids=torch.tensor(ids),
                    labels=torch.tensor(ids),
                    loss_mask=torch.zeros(len(ids)),
                    pixel_values=prompt.pixel_values,
                )
                for prompt, ids in zip(prompts, current, strict=True)
            ]
            logits, *_ = self._logits(rows)
            last = torch.stack([row[len(ids) - 1] for row, ids in zip(logits, current, strict=True)])
            for ids, new in zip(current, last.argmax(dim=-1).tolist(), strict=True):
                ids.append(new)
        return [_before(ids[length:], stop_id) for ids, length in zip(current, lengths, strict=True)]


def _loss_and_hit(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and whether the label is the most likely token, [b, s] on the host, in one copy from the device.

    Args:
        logits: [b, s, vocabulary] on the device, of any precision.
        labels: [b, s] on the device.
    """
    parts = []
    pieces = (tensor.split(_POSITIONS) for tensor in (logits.flatten(0, 1), labels.flatten()))
    for scores, target in zip(*pieces, strict=True):
        loss = torch.nn.functional.cross_entropy(scores.float(), target, reduction="none")
        parts.append(torch.stack([loss, (scores.argmax(dim=-1) == target).float()]))
    losses, hit = torch.cat(parts, dim=1).cpu().view(2, *labels.shape)
    return losses, hit > 0


def _completed_words(continues: list[bool], hit: list[bool]) -> tuple[int, int]:
    """Runs of positions that go on with a word, and those in which every position is hit."""
    runs = [[h for _, h in run] for goes_on, run in groupby(zip(continues, hit, strict=True), itemgetter(0)) if goes_on]
    return len(runs), sum(map(all, runs))


def _before(ids: list[int], stop_id: int) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


def perplexity(scores: Sequence[Score]) -> float:
    """exp of the mean loss per target token."""
    return float(torch.tensor(sum(s.loss for s in scores) / sum(s.tokens for s in scores)).exp())


def word_completion(scores: Sequence[Score]) -> float:
    """Share of the words of several pieces that are completed exactly, given the text up to their first piece."""
    return sum(s.words_completed for s in scores) / max(1, sum(s.words for s in scores))


def exact_match(scores: Sequence[Score]) -> float:
    """Share of the samples whose target greedy decoding gives exactly."""
    return sum(s.exact for s in scores) / len(scores)
