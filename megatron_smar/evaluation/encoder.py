# SPDX-License-Identifier: Apache-2.0
"""Encodes held-out records and benchmark questions as the trainer encodes its samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_tokenizer

from megatron_smar.config.build import get_run_config
from megatron_smar.data.batch import EncodedSample
from megatron_smar.data.conversations import record_segments, template_for
from megatron_smar.data.fields import image_modalities
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sample_encoder import SampleEncoder
from megatron_smar.data.tiling import ImageProcessor
from megatron_smar.data.tokens import TextEncoder
from megatron_smar.evaluation.benchmarks.base import Question
from megatron_smar.evaluation.evaluator import Evaluator


class HeldOutEncoder:
    """Encodes with the run's template, tokenizer and tiles, which are Megatron's global state."""

    def __init__(self) -> None:
        run = get_run_config()
        self.template = template_for(run.template, get_tokenizer())
        self.text = TextEncoder(get_tokenizer(), self.template.special_tokens, run.modalities)
        self.tokens_per_tile = run.tokens_per_tile
        images = ImageProcessor(run.images)
        self.samples = SampleEncoder(self.text, images, self.tokens_per_tile, get_args().seq_length)

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer."""
        return self.text.special_id(self.template.end_of_turn)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer, in the export's generation config too."""
        return frozenset((self.end_of_turn, self.text.eos_id))

    def answer(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer's tokens, without those that end it."""
        return str(get_tokenizer().detokenize([token for token in ids if token not in self.end_ids])).strip()

    def continues_word(self) -> torch.Tensor:
        """Returns a [vocabulary] bool tensor: tokens of letters only, without the space that begins a word."""
        tokenizer = get_tokenizer()
        pieces = tokenizer._tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size)))  # not public
        return torch.tensor([piece.isalpha() and piece[0] not in "▁Ġ" for piece in pieces])

    def passage(self, key: str, record: dict[str, Any]) -> EncodedSample:
        """Encodes a record of text, in which every token is a target.

        Raises:
            SampleError: The record cannot be used; the message names it.
        """
        with named(key):
            return self.samples.encode(key, record_segments(record, self.template, 0), [])

    def question(self, item: dict[str, Any], root: Path, answered: bool = True) -> EncodedSample:
        """Encodes a question with its answer as target, or only the prompt.

        Raises:
            SampleError: The record cannot be used; the message names it.
        """
        turns = [{"from": "human", "value": item["question"]}, {"from": "gpt", "value": item["answer"]}]
        files = [(root / path).read_bytes() for path in item["image"]]
        segments = record_segments({"conversations": turns}, self.template, len(files))
        if not answered:
            segments = [segment for segment in segments if not segment.is_target]
        key, kinds = str(item.get("id", "")), image_modalities(item, len(files))
        with named(key):
            return (self.samples.encode if answered else self.samples.prompt)(key, segments, files, kinds)

    def prompt(self, question: Question) -> EncodedSample:
        """Encodes a benchmark's question as a prompt: the pictures, each on a line, and the text.

        Raises:
            SampleError: A picture cannot be read, or the prompt is too long; the message does not name the question.
        """
        try:
            files = [image if isinstance(image, bytes) else image.read_bytes() for image in question.images]
        except OSError as error:
            raise SampleError("missing_image", f"{error.filename} cannot be read ({error.strerror})") from error
        text = "<image>\n" * len(files) + question.prompt
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "-"}]
        segments = record_segments({"conversations": turns}, self.template, len(files))
        asked = [segment for segment in segments if not segment.is_target]
        return self.samples.prompt(question.key, asked, files)


@contextmanager
def named(key: str) -> Iterator[None]:
    """Adds a record's key in front of the message of an error in that record."""
    try:
        yield
    except SampleError as error:
        raise SampleError(error.reason, f"{key}: {error.message}") from error


def run_evaluator(model: list[torch.nn.Module], batch_size: int) -> tuple[Evaluator, HeldOutEncoder]:
    """Returns what evaluates a run's model on samples that are encoded as the run's.

    Args:
        model: This rank's model chunks, of which there is one, with Megatron's wrappers.
        batch_size: Samples per forward pass.
    """
    encoder, args = HeldOutEncoder(), get_args()
    evaluator = Evaluator(
        unwrap_model(model)[0],
        encoder.text.image_tokens.placeholder_ids,
        encoder.tokens_per_tile,
        encoder.text.pad_id,
        args.tensor_model_parallel_size if args.sequence_parallel else 1,
        batch_size,
    )
    return evaluator, encoder
