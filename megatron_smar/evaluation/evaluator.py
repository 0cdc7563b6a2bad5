# SPDX-License-Identifier: Apache-2.0
"""Likelihood and exact answers on held-out samples, over all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from megatron_smar.data.batch import EncodedSample, VisionLanguageBatch, collate
from megatron_smar.model.vlm import VisionLanguageModel
from megatron_smar.routing.modalities import PADDING
from megatron_smar.training.batch import ModelBatch, prepare_batch

# Positions whose logits are converted to float32 at a time: 0.6 GB for a vocabulary of 150,000.
_POSITIONS = 1024


@dataclass(frozen=True)
class Score:
    """The model's score on one sample's target tokens.

    Attributes:
        loss: Sum of the cross-entropy, in nats.
        tokens: Number of target tokens.
        exact: Whether each target token is the most likely one, that is, whether greedy decoding gives the target.
        words: Number of words of more than one token among the targets.
        words_completed: Number of those words whose tokens after the first are all the most likely ones.
    """

    loss: float
    tokens: int
    exact: bool
    words: int = 0
    words_completed: int = 0


class Evaluator:
    """Runs a model without pipeline and context parallelism on encoded samples.

    Args:
        model: The model without wrappers; it is put into evaluation mode.
        placeholders: Token ids of the placeholders, one for each kind of images, in the order of the modalities.
        tokens_per_tile: Vision tokens per tile.
        pad_id: Token id that pads rows.
        multiple_of: The sequence length is rounded up to a multiple of it (sequence parallelism).
        batch_size: Samples per forward pass.
        continues_word: Whether each token of the vocabulary continues a word, [vocabulary] bool; None to count no
            words.

    Raises:
        ValueError: There is pipeline or context parallelism.
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
        """Scores every sample; data-parallel ranks share the work, and all return all results, in order."""
        return [ends[0] for ends in self.score_endings(samples, [None] * len(samples), name)]

    def score_endings(
        self, samples: Sequence[EncodedSample], endings: Sequence[Sequence[int] | None], name: str
    ) -> list[list[Score]]:
        """Scores samples with each of several tokens in the place of the last target, in one pass per sample.

        Args:
            samples: The samples; they are read when they are needed, so that they may be encoded then.
            endings: For each sample, the tokens that take the place of its last label; None for that label alone.
            name: Name of the progress bar.

        Returns:
            For each sample a score per ending, on all ranks.
        """
        found: dict[int, list[Score]] = {}
        order = sorted(range(len(samples)), key=lambda n: -len(samples[n].input_ids))  # memory fails early
        for places in self._passes(len(samples), name):
            numbers = [order[place] for place in places]
            if not numbers:
                self.pass_through([])
                continue
            scores = self._score_batch([samples[n] for n in numbers], [endings[n] for n in numbers])
            found |= dict(zip(numbers, scores, strict=True))
        gathered: list[dict[int, list[Score]]] = [{}] * self.groups.dp.size()
        dist.all_gather_object(gathered, found, group=self.groups.dp)
        merged = {number: scores for part in gathered for number, scores in part.items()}
        return [merged[number] for number in range(len(samples))]

    def route(self, samples: Sequence[EncodedSample], name: str, announce: Callable[[list[int]], None]) -> None:
        """Passes every sample through the model once, for what its layers record; data-parallel ranks share the work.

        Args:
            samples: The samples.
            name: Name of the progress bar.
            announce: Called before each forward pass with the numbers of the samples in its rows; -1 for a row whose
                tokens are not counted, which a rank needs when others have one sample more.
        """
        for numbers in self._passes(len(samples), name):
            announce(numbers or [-1])
            self.pass_through([samples[number] for number in numbers])

    def _passes(self, number: int, name: str) -> Iterator[list[int]]:
        """Yields the places of the samples in each of this rank's forward passes; neighbors share a pass.

        Every rank makes the same number of passes, or the experts' all-to-all would hang; a rank's last may be empty.
        """
        size = self.batch_size * self.groups.dp.size()
        starts = range(0, number, size)
        for start in tqdm(starts, desc=name, unit="batch", disable=dist.get_rank() > 0, mininterval=2):
            yield list(range(start + self.groups.dp.rank(), min(start + size, number), self.groups.dp.size()))

    def most_of_replicas(self, number: int) -> int:
        """Returns the largest of the replicas' numbers."""
        if self.groups.dp.size() == 1:
            return number
        most = torch.tensor(number, device=next(self.model.parameters()).device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.dp)
        return int(most)

    def idle_sample(self) -> EncodedSample:
        """Returns a sample of one token, for passes that a rank makes only because others need its experts."""
        ids = torch.tensor([self.pad_id])
        fields = {"input_ids": ids, "labels": ids, "loss_mask": torch.zeros(1)}
        tiles = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return EncodedSample(__key__="", __restore_key__=(), pixel_values=tiles, **fields)

    def pass_through(self, samples: list[EncodedSample]) -> None:
        """Passes this replica's samples through the model; without any, a token that counts as padding."""
        self._logits(samples or [self.idle_sample()], counted=bool(samples))

    def _score_batch(self, samples: list[EncodedSample], endings: Sequence[Sequence[int] | None]) -> list[list[Score]]:
        logits, batch, placed = self._logits(samples)
        losses, hit = _loss_and_hit(logits, placed.labels)
        mask = batch.loss_mask > 0
        continues = torch.zeros_like(mask)
        if self.continues_word is not None:
            continues = self.continues_word.cpu()[batch.labels] & mask
        scores = [
            Score(float(loss[m].sum()), int(m.sum()), bool(h[m].all()), *count_completed_words(c.tolist(), h.tolist()))
            for loss, h, m, c in zip(losses, hit, mask, continues, strict=True)
        ]
        return [
            [score] if ends is None else _with_endings(row[len(sample.input_ids) - 1], loss, h, m, ends)
            for score, sample, row, loss, h, m, ends in zip(
                scores, samples, logits, losses, hit, mask, endings, strict=True
            )
        ]

    def prepare(self, samples: Sequence[EncodedSample], length: int) -> tuple[VisionLanguageBatch, ModelBatch]:
        """Returns one batch of samples, each a row of `length` positions, on the host and on the device."""
        host = collate([[sample] for sample in samples], num_rows=len(samples), length=length, pad_id=self.pad_id)
        return host, prepare_batch(host, self.placeholders, self.tokens_per_tile, True, self.groups)

    @torch.no_grad()
    def _logits(
        self, samples: list[EncodedSample], counted: bool = True
    ) -> tuple[Tensor, VisionLanguageBatch, ModelBatch]:
        """Returns the model's logits [b, s, vocabulary], and the batch on the host and on the device.

        Args:
            samples: The samples, each in one row.
            counted: Whether the routers count the tokens; otherwise they are padding to them.
        """
        longest = max(len(sample.input_ids) for sample in samples)
        host, batch = self.prepare(samples, -(-longest // self.multiple_of) * self.multiple_of)
        logits = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            modality_ids=batch.modality_ids if counted else torch.full_like(batch.modality_ids, PADDING),
            pixel_values=batch.pixel_values,
            vision_index=batch.vision_index,
        )
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.groups.tp)
        return logits, host, batch


def _loss_and_hit(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy, and whether the label is the most likely token, [b, s] on the host, with one copy.

    Args:
        logits: Logits [b, s, vocabulary] on the device, of any precision.
        labels: Target token ids [b, s] on the device.
    """
    parts = []
    pieces = (tensor.split(_POSITIONS) for tensor in (logits.flatten(0, 1), labels.flatten()))
    for scores, target in zip(*pieces, strict=True):
        loss = torch.nn.functional.cross_entropy(scores.float(), target, reduction="none")
        parts.append(torch.stack([loss, (scores.argmax(dim=-1) == target).float()]))
    losses, hit = torch.cat(parts, dim=1).cpu().view(2, *labels.shape)
    return losses, hit > 0


def _with_endings(logits: Tensor, losses: Tensor, hit: Tensor, mask: Tensor, endings: Sequence[int]) -> list[Score]:
    """Returns one row's scores with each ending.

    Args:
        logits: Logits of the last target [vocabulary], on the device.
        losses: Cross-entropy of the row's labels [s].
        hit: Whether each label is the most likely token [s].
        mask: Which positions are targets [s]; the last one is replaced.
        endings: The tokens that replace the last label.
    """
    before = mask.nonzero().flatten()[:-1]
    loss, exact = float(losses[before].sum()), bool(hit[before].all())
    likelihoods = logits.float().log_softmax(dim=-1)
    best = int(likelihoods.argmax())
    last = (-likelihoods[torch.tensor(endings, device=logits.device)]).tolist()
    return [
        Score(loss + ending_loss, len(before) + 1, exact and ending == best)
        for ending, ending_loss in zip(endings, last, strict=True)
    ]


def count_completed_words(continues: list[bool], hit: list[bool]) -> tuple[int, int]:
    """Counts words of more than one token, and those of them that the model completes.

    Args:
        continues: Whether each position continues a word; adjacent such positions belong to one word.
        hit: Whether the model's most likely token is correct at each position.

    Returns:
        The number of words, and the number of words with only correct tokens.
    """
    words: list[bool] = []  # for each word, whether all its tokens are correct
    in_word = False
    for is_continuation, is_correct in zip(continues, hit, strict=True):
        if is_continuation and not in_word:
            words.append(True)
        if is_continuation:
            words[-1] = words[-1] and is_correct
        in_word = is_continuation
    return len(words), sum(words)


def perplexity(scores: Sequence[Score]) -> float:
    """Returns exp of the mean loss per target token."""
    return float(torch.tensor(sum(s.loss for s in scores) / sum(s.tokens for s in scores)).exp())


def word_completion(scores: Sequence[Score]) -> float:
    """Returns the share of words of several tokens that are completed exactly, given the text up to the first token."""
    return sum(s.words_completed for s in scores) / max(1, sum(s.words for s in scores))


def exact_match(scores: Sequence[Score]) -> float:
    """Returns the share of the samples whose target greedy decoding gives exactly."""
    return sum(s.exact for s in scores) / len(scores)
