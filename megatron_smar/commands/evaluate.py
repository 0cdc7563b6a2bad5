# SPDX-License-Identifier: Apache-2.0
r"""Measures a checkpoint: perplexity, word completion, visual question answering, and the routing of both modalities.

    torchrun --nproc-per-node 2 tools/evaluate.py --load CHECKPOINT --text held_out.jsonl --vqa questions.json \
        --image-root DIR --output results.json  [--expert-model-parallel-size 2 ...]

The model's flags, its vision model, tokenizer, conversation template and tiles are read from the checkpoint, which is
of a run or an import. Flags of pretrain_vlm.py that are given (layout, precision, --vision-model, --seq-length ...)
override them.
--text: records with a `text`. Measured: perplexity, and the share of words of several tokens that are completed
exactly, given the text up to their first token. --vqa: records with `image` (a path or a list), `question`, `answer`
and optionally a `kind` to group by. Measured: the share of exact answers, and the routing.
Both files are JSON lists or JSON lines, as for prepare.py.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_smar import runtime

runtime.install_or_exit()

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_tokenizer

from megatron_smar.checkpoint.stored_flags import stored_flags
from megatron_smar.config.build import get_run_config
from megatron_smar.config.run_file import saved_folder
from megatron_smar.data.batch import EncodedSample
from megatron_smar.data.conversations import record_segments, template_for
from megatron_smar.data.fields import image_modalities
from megatron_smar.data.held_out import read_questions, read_texts
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sample_encoder import SampleEncoder
from megatron_smar.data.tiling import ImageProcessor
from megatron_smar.data.tokens import TextEncoder
from megatron_smar.evaluation.evaluator import Evaluator, exact_match, perplexity, word_completion
from megatron_smar.evaluation.generation import generate
from megatron_smar.monitoring.recorder import recorded_routing
from megatron_smar.training.setup import fail, start

# The alltoall dispatcher accepts batches of any length; Megatron's batch sizes and frozen parts have no effect here.
RUN = {"moe_token_dispatcher_type": "alltoall", "micro_batch_size": 1, "freeze": ["vision"]}


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Parses this program's options; returns them and the remaining flags, which are those of pretrain_vlm.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_samples(parser)
    parser.add_argument("--examples", type=int, default=24, help="answers decoded and shown (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--config", type=Path, help="a run's run.yaml, instead of --load with its folder")
    options, flags = parser.parse_known_args()
    try:
        return options, [*flags, *(["--load", str(saved_folder(options.config))] if options.config else [])]
    except ValueError as error:
        fail(error)


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the samples, and how the model runs on them."""
    parser.add_argument("--text", type=Path, help="records with `text`")
    parser.add_argument("--vqa", type=Path, help="records with `image`, `question`, `answer`, `kind`")
    parser.add_argument("--image-root", type=Path, default=Path("."), help="folder of the images in --vqa")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per forward pass (default: %(default)s)")
    parser.add_argument(
        "--float32", action="store_true", help="run in float32 (default: in the precision of the training)"
    )


def read_records(options: argparse.Namespace) -> None:
    """Reads --text and --vqa, each a JSON list or JSON lines, before anything is loaded."""
    try:
        options.texts = read_texts(options.text) if options.text else []
        options.questions = read_questions(options.vqa, options.image_root) if options.vqa else []
    except ValueError as error:
        fail(error)


class Encoder:
    """Encodes held-out records as in training."""

    def __init__(self) -> None:
        run = get_run_config()
        self.template = template_for(run.template, get_tokenizer())
        self.text = TextEncoder(get_tokenizer(), self.template.special_tokens, run.modalities)
        self.tokens_per_tile = run.tokens_per_tile
        images = ImageProcessor(run.images)
        self.samples = SampleEncoder(self.text, images, self.tokens_per_tile, get_args().seq_length)

    def passage(self, key: str, record: dict[str, Any]) -> EncodedSample:
        """Encodes a record of text, in which every token is a target."""
        with named(key):
            return self.samples.encode(key, record_segments(record, self.template, 0), [])

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer."""
        return self.text.special_id(self.template.end_of_turn)

    def continues_word(self) -> torch.Tensor:
        """Returns a [vocabulary] bool tensor: tokens of letters only, without the space that begins a word."""
        tokenizer = get_tokenizer()
        pieces = tokenizer._tokenizer.ids_to_tokens(list(range(tokenizer.vocab_size)))  # not public
        return torch.tensor([piece.isalpha() and piece[0] not in "▁Ġ" for piece in pieces])

    def question(self, item: dict[str, Any], root: Path, answered: bool = True) -> EncodedSample:
        """Encodes a question with its answer as target, or only the prompt."""
        turns = [{"from": "human", "value": item["question"]}, {"from": "gpt", "value": item["answer"]}]
        files = [(root / path).read_bytes() for path in item["image"]]
        segments = record_segments({"conversations": turns}, self.template, len(files))
        if not answered:
            segments = [segment for segment in segments if not segment.is_target]
        key, kinds = str(item.get("id", "")), image_modalities(item, len(files))
        with named(key):
            return (self.samples.encode if answered else self.samples.prompt)(key, segments, files, kinds)


@contextmanager
def named(key: str) -> Iterator[None]:
    """Adds a record's key in front of the message of an error in that record."""
    try:
        yield
    except SampleError as error:
        raise SampleError(error.reason, f"{key}: {error.message}") from error


def measure(options: argparse.Namespace, evaluator: Evaluator, encoder: Encoder) -> dict[str, Any]:
    """Measures everything that the options ask for."""
    results: dict[str, Any] = {}
    if options.texts:
        samples = [encoder.passage(str(r.get("id", i)), r) for i, r in enumerate(options.texts)]
        scores = evaluator.score(samples, "text")
        results |= {"text_perplexity": perplexity(scores), "word_accuracy": word_completion(scores)}
    if options.questions:
        results |= measure_vqa(options, evaluator, encoder)
    return results


def measure_vqa(options: argparse.Namespace, evaluator: Evaluator, encoder: Encoder) -> dict[str, Any]:
    """Measures the accuracy by kind of question and the routing, and generates some answers."""
    items = options.questions
    samples = [encoder.question(item, options.image_root) for item in items]
    with recorded_routing([evaluator.model]) as recorder:
        scores = evaluator.score(samples, "visual questions")
    kinds = defaultdict(list)
    for item, score in zip(items, scores, strict=True):
        kinds[item.get("kind", "all")].append(score)
    args = get_args()
    shown = items[: options.examples]
    prompts = [encoder.question(item, options.image_root, answered=False) for item in shown]
    end = encoder.end_of_turn
    answers = generate(evaluator, prompts, [8] * len(prompts), lambda _, new: new[-1] == end, "answers")
    texts = [get_tokenizer().detokenize([i for i in ids if i != end]).strip() for ids in answers]
    shares = recorder.expert_shares()
    return {
        "vqa_accuracy": exact_match(scores),
        "vqa_by_kind": {k: {"accuracy": exact_match(v), "count": len(v)} for k, v in sorted(kinds.items())},
        "mrd_distance_by_layer": list(recorder.distances(args.moe_router_topk, args.smar_eps).values()),
        "expert_share": {
            modality.name: [share[modality.id].tolist() for share in shares.values()]
            for modality in encoder.text.modalities
        },
        "examples": [item | {"prediction": text} for item, text in zip(shown, texts, strict=True)],
    }


def load_model(options: argparse.Namespace, flags: list[str]) -> tuple[Evaluator, Encoder]:
    """Loads the checkpoint that the flags name.

    Args:
        options: Options of a program that runs a model; `questions`, `float32` and `batch_size` are read.
        flags: The flags of pretrain_vlm.py among the program's own.
    """
    try:
        defaults = RUN | stored_flags(flags, asks=bool(options.questions))
        defaults |= {"bf16": False, "fp16": False} if options.float32 else {}
    except ValueError as error:
        fail(error)
    only_run = ["--skip-train", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"]
    model, _, _ = start([*flags, *only_run], defaults)
    encoder, args = Encoder(), get_args()
    evaluator = Evaluator(
        unwrap_model(model)[0],
        encoder.text.image_tokens.placeholder_ids,
        encoder.tokens_per_tile,
        encoder.text.pad_id,
        args.tensor_model_parallel_size if args.sequence_parallel else 1,
        options.batch_size,
        encoder.continues_word(),
    )
    return evaluator, encoder


def main() -> None:
    """Loads the checkpoint, measures, and writes the results."""
    options, flags = parse()
    read_records(options)
    evaluator, encoder = load_model(options, flags)
    try:
        results = measure(options, evaluator, encoder)
    except SampleError as error:  # a sample that is too long for the flags
        fail(error)
    if dist.get_rank() == 0:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for name, value in results.items():
            if isinstance(value, float):
                print(f"{name:24} {value:.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
