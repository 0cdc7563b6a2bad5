# SPDX-License-Identifier: Apache-2.0
"""Likelihood and exact answers on held-out samples, over all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from megatron_smar.data.batch import EncodedSample, VisionLanguageBatch, collate
from megatron_smar.model.vlm import VisionLanguageModel
from megatron_smar.routing.modalities import PADDING
from megatron_smar.training.batch import ModelBatch, on_device, prepare_batch

# Positions whose logits are gathered and converted to float32 at a time: 0.6 GB for a vocabulary of 150,000.
_POSITIONS = 1024
# Positions of a batch, which has fewer rows if they are long: 5 GB of logits in bf16 for a vocabulary of 150,000.
_BATCH_POSITIONS = 16384


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

    def score(
        self, samples: Sequence[EncodedSample], name: str, announce: Callable[[list[int]], None] | None = None
    ) -> list[Score]:
        """Scores every sample; data-parallel ranks share the work, and all return all results, in order.

        Args:
            samples: The samples.
            name: Name of the progress bar.
            announce: As for `route`.
        """
        return [ends[0] for ends in self.score_endings(samples, [None] * len(samples), name, announce)]

    def score_endings(
        self,
        samples: Sequence[EncodedSample],
        endings: Sequence[Sequence[int] | None],
        name: str,
        announce: Callable[[list[int]], None] | None = None,
    ) -> list[list[Score]]:
        """Scores samples with each of several tokens in the place of the last target, in one pass per sample.

        Args:
            samples: The samples; they are read when they are needed, so that they may be encoded then.
            endings: For each sample, the tokens that take the place of its last label; None for that label alone.
            name: Name of the progress bar.
            announce: As for `route`.

        Returns:
            For each sample a score per ending, on all ranks.
        """
        found: dict[int, list[Score]] = {}
        order = sorted(range(len(samples)), key=lambda n: -len(samples[n].input_ids))  # memory fails early
        for places in self._passes([len(samples[number].input_ids) for number in order], name):
            numbers = [order[place] for place in places]
            if announce:
                announce(numbers or [-1])
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
        for numbers in self._passes([len(sample.input_ids) for sample in samples], name):
            announce(numbers or [-1])
            self.pass_through([samples[number] for number in numbers])

    def _passes(self, lengths: Sequence[int], name: str) -> Iterator[list[int]]:
        """Yields the places of the samples in each of this rank's forward passes; neighbors share a pass.

        Every rank makes the same number of passes, or the experts' all-to-all would hang; a rank's last may be empty.

        Args:
            lengths: Length of each sample.
            name: Name of the progress bar.
        """
        rank, replicas, start = self.groups.dp.rank(), self.groups.dp.size(), 0
        with tqdm(total=len(lengths), desc=name, unit="sample", disable=dist.get_rank() > 0, mininterval=2) as bar:
            while start < len(lengths):
                longest = max(lengths[start : start + self.batch_size * replicas])
                end = start + replicas * max(1, min(self.batch_size, _BATCH_POSITIONS // longest))
                yield list(range(start + rank, min(end, len(lengths)), replicas))
                bar.update(min(end, len(lengths)) - start)
                start = end

    def most_of_replicas(self, number: int) -> int:
        """Returns the largest of the replicas' numbers."""
        if self.groups.dp.size() == 1:
            return number
        most = torch.tensor(number, device=next(self.model.parameters()).device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.groups.dp)
        return int(most)

    def idle_sample(self) -> EncodedSample:
        """Returns a sample of one token, for passes that a rank makes only because others need its experts."""
        return text_sample(torch.tensor([self.pad_id]))

    def pass_through(self, samples: list[EncodedSample]) -> None:
        """Passes this replica's samples through the model; without any, a token that counts as padding."""
        self._logits(samples or [self.idle_sample()], counted=bool(samples))

    def _score_batch(self, samples: list[EncodedSample], endings: Sequence[Sequence[int] | None]) -> list[list[Score]]:
        logits, batch, placed = self._logits(samples)
        mask = batch.loss_mask > 0
        losses, hit = self._loss_and_hit(logits, placed.labels, mask)
        continues = torch.zeros_like(mask)
        if self.continues_word is not None:
            continues = self.continues_word.cpu()[batch.labels] & mask
        scores = [
            [
                Score(
                    float(loss[m].sum()), int(m.sum()), bool(h[m].all()), *count_completed_words(c.tolist(), h.tolist())
                )
            ]
            for loss, h, m, c in zip(losses, hit, mask, continues, strict=True)
        ]
        ended = {row: ends for row, ends in enumerate(endings) if ends is not None}
        last = [len(samples[row].input_ids) - 1 for row in ended]
        for row, found in zip(ended, self._likelihoods(logits, list(ended), last, list(ended.values())), strict=True):
            before = mask[row].nonzero().flatten()[:-1]  # without the target that the endings replace
            loss, exact = float(losses[row][before].sum()), bool(hit[row][before].all())
            scores[row] = [Score(loss - value, len(before) + 1, exact and is_best) for value, is_best in found]
        return scores

    def _likelihoods(
        self, logits: Tensor, rows: list[int], positions: list[int], endings: Sequence[Sequence[int]]
    ) -> list[list[tuple[float, bool]]]:
        """Returns for each row and ending the log-likelihood, and whether it is the most likely token.

        Args:
            logits: This rank's share of the logits [b, s, vocabulary / tp].
            rows: The rows in question.
            positions: Position of the target in each of them.
            endings: Tokens of each of them.
        """
        if not rows:
            return []
        places = torch.tensor([rows, positions], device=logits.device)
        likelihoods = self._gather(logits[places[0], places[1]]).float().log_softmax(dim=-1)
        numbers = [number for number, ends in enumerate(endings) for _ in ends]
        wanted = torch.tensor([numbers, [token for ends in endings for token in ends]], device=logits.device)
        values = likelihoods[wanted[0], wanted[1]]
        is_best = likelihoods.argmax(dim=-1)[wanted[0]] == wanted[1]
        pairs = iter(torch.stack([values, is_best.to(values.dtype)]).cpu().t().tolist())
        return [[(value, best > 0) for value, best in islice(pairs, len(ends))] for ends in endings]

    def _gather(self, logits: Tensor) -> Tensor:
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.groups.tp)

    @torch.no_grad()
    def _loss_and_hit(self, logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the targets' cross-entropy, and whether each is the most likely token, on the host, with one copy.

        Args:
            logits: This rank's share of the logits [b, s, vocabulary / tp] on the device, of any precision.
            labels: Target token ids [b, s] on the device.
            mask: Which positions are targets, [b, s] bool on the host; the others get 0 and False.
        """
        targets = mask.flatten().nonzero().flatten()
        parts = []
        for piece in on_device(targets).split(_POSITIONS):
            scores, target = self._gather(logits.flatten(0, 1)[piece]), labels.flatten()[piece]
            loss = torch.nn.functional.cross_entropy(scores.float(), target, reduction="none")
            parts.append(torch.stack([loss, (scores.argmax(dim=-1) == target).float()]))
        found = torch.zeros(2, mask.numel())
        if parts:
            found[:, targets] = torch.cat(parts, dim=1).cpu()
        losses, hit = found.view(2, *mask.shape)
        return losses, hit > 0

    def prepare(
        self, samples: Sequence[EncodedSample], length: int, counted: bool = True
    ) -> tuple[VisionLanguageBatch, ModelBatch]:
        """Returns one batch of samples, on the host and on the device.

        Args:
            samples: The samples, each in one row.
            length: Number of positions of each row.
            counted: Whether the routers count the tokens; otherwise they are padding to them.
        """
        host = collate([[sample] for sample in samples], num_rows=len(samples), length=length, pad_id=self.pad_id)
        batch = prepare_batch(host, self.placeholders, self.tokens_per_tile, True, self.groups)
        if not counted:
            batch = replace(batch, modality_ids=torch.full_like(batch.modality_ids, PADDING))
        return host, batch

    @torch.no_grad()
    def _logits(
        self, samples: list[EncodedSample], counted: bool = True
    ) -> tuple[Tensor, VisionLanguageBatch, ModelBatch]:
        """Returns this rank's share of the logits [b, s, vocabulary / tp], and the batch on the host and on the device.

        Args:
            samples: The samples, each in one row.
            counted: Whether the routers count the tokens; otherwise they are padding to them.
        """
        longest = max(len(sample.input_ids) for sample in samples)
        host, batch = self.prepare(samples, -(-longest // self.multiple_of) * self.multiple_of, counted)
        return self.model(**batch.model_inputs()), host, batch


def text_sample(ids: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> EncodedSample:
    """Returns a sample without pictures.

    Args:
        ids: Token ids [n].
        labels: Token to predict at each position [n]; None for a prompt.
        mask: Which positions are targets, [n] float; None for none.
    """
    return EncodedSample(
        __key__="",
        __restore_key__=(),
        input_ids=ids,
        labels=ids if labels is None else labels,
        loss_mask=torch.zeros(len(ids)) if mask is None else mask,
        pixel_values=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
    )


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
