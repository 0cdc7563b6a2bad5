# SPDX-License-Identifier: Apache-2.0
"""Training speed compared with Hugging Face's: same model, batch and threads, in one process, in alternating steps.

"theirs": `InternVLForConditionalGeneration` with a Mixtral text config in a plain PyTorch loop with AdamW and gradient
clipping. "ours": Megatron's `train_step` with DDP, Megatron's optimizer and SMAR, as in `pretrain_vlm.py`, and with
--skip-unused-experts: at the default four layers it saves more than in a deep model, so --all-experts measures without
it. The result is the ratio of tokens per second, the median over pairs of consecutive steps.

    python benchmarks/vs_transformers.py [--quick] [--json]
    python benchmarks/vs_transformers.py --lengths llava [--samples 96] [--all-experts] [--quick] [--json]

With --lengths llava the samples have the lengths and tiles of LLaVA-1.5's mixture (mixed_lengths.py): "ours" packs
them, "theirs" pads batches of similar lengths. A pair is then a round of the same samples, and tokens per second are
those of the samples, padding excluded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

IMAGE_TOKEN, IMAGE_SIZE, PATCH, VOCABULARY = 5, 64, 8, 8192
ONE_PACK = ["--micro-batch-size", "1", "--global-batch-size", "1"]
TOKENS_PER_TILE = (IMAGE_SIZE // PATCH // 2) ** 2


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="Pairs of steps that are timed. Default: %(default)s.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of both. Default: all cores.")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--ffn-hidden-size", type=int, default=896)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, help="Of a row or pack. Default: 512; 1024 with --lengths llava.")
    parser.add_argument("--lengths", choices=("fixed", "llava"), default="fixed", help="Default: %(default)s.")
    parser.add_argument(
        "--samples", type=int, default=96, help="Of a round, with --lengths llava. Default: %(default)s."
    )
    parser.add_argument("--bf16", action="store_true", help="Both in bfloat16 instead of float32.")
    parser.add_argument("--all-experts", action="store_true", help="Ours without --skip-unused-experts.")
    parser.add_argument("--quick", action="store_true", help="Three pairs, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    options.seq_length = options.seq_length or (1024 if options.lengths == "llava" else 512)
    return options


def hugging_face_model(options: argparse.Namespace) -> Any:
    """Returns Hugging Face's model, randomly initialized."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, MixtralConfig

    torch.manual_seed(1)
    vision = InternVLVisionConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        patch_size=[PATCH, PATCH],
    )
    text = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=options.ffn_hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=options.num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=options.seq_length,
        tie_word_embeddings=False,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    return model.bfloat16() if options.bf16 else model


def our_flags(options: argparse.Namespace, vision_path: str) -> list[str]:
    """Returns Megatron's flags for the same model."""
    flags = f"""
        --vision-model {vision_path} --image-size {IMAGE_SIZE} --connector internvl --modality-routing smar
        --num-layers {options.num_layers} --hidden-size {options.hidden_size}
        --ffn-hidden-size {options.ffn_hidden_size} --num-attention-heads 8 --group-query-attention
        --num-query-groups 4 --num-experts {options.num_experts} --moe-router-topk 2
        --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm
        --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
        --attention-dropout 0 --hidden-dropout 0 --seq-length {options.seq_length}
        --max-position-embeddings {options.seq_length} --micro-batch-size {options.micro_batch_size}
        --global-batch-size {options.micro_batch_size} --train-iters 1000 --lr 1e-4 --clip-grad 1.0 --weight-decay 0
        --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --make-vocab-size-divisible-by 1
        {"--bf16" if options.bf16 else ""} --no-check-for-nan-in-loss-and-grad
        {"" if options.all_experts else "--skip-unused-experts"}
    """
    return flags.split()


def make_batch(options: argparse.Namespace) -> dict[str, Any]:
    """Returns one micro-batch: each sequence is an image followed by random text."""
    import torch

    generator = torch.Generator().manual_seed(2)
    shape = (options.micro_batch_size, options.seq_length)
    ids = torch.randint(6, VOCABULARY, shape, generator=generator)
    ids[:, 1 : 1 + TOKENS_PER_TILE] = IMAGE_TOKEN
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    mask = (labels != IMAGE_TOKEN).float()
    mask[:, -1] = 0
    pixels = torch.randn(options.micro_batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"ids": ids, "labels": labels, "mask": mask, "pixels": pixels}


def their_trainer(model: Any) -> Callable[[dict[str, Any]], float]:
    """Returns a plain PyTorch training step on Hugging Face's model, with its vision tower frozen as in "ours"."""
    import torch

    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    model.train()

    def step(inputs: dict[str, Any]) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss)

    return step


def their_step(model: Any, batch: dict[str, Any]) -> Callable[[], float]:
    """Returns the step of `their_trainer` on one batch."""
    labels = batch["ids"].masked_fill(batch["ids"] == IMAGE_TOKEN, -100)
    return partial(their_trainer(model), {"input_ids": batch["ids"], "pixel_values": batch["pixels"], "labels": labels})


def our_trainer(flags: list[str]) -> Callable[[Any], float]:
    """Returns Megatron's `train_step` on this project's model, a function of the micro-batch."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training import get_args
    from megatron.training.training import train_step

    from megatron_smar.training.providers import make_forward_step
    from megatron_smar.training.setup import start

    model, optimizer, scheduler = start(flags)
    get_args().curr_iteration = 0
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    schedule, forward_step = get_forward_backward_func(), make_forward_step([IMAGE_TOKEN], TOKENS_PER_TILE)
    for chunk in model:
        chunk.train()

    def step(micro_batch: Any) -> float:
        iterator = RerunDataIterator(iter([micro_batch]))
        losses, *_ = train_step(forward_step, iterator, model, optimizer, scheduler, config, schedule, iteration=0)
        return float(losses["lm loss"])

    return step


def our_step(flags: list[str], batch: dict[str, Any]) -> Callable[[], float]:
    """Returns the step of `our_trainer` on one batch."""
    import torch

    from megatron_smar.data.batch import VisionLanguageBatch

    micro_batch = VisionLanguageBatch(
        __key__=[str(i) for i in range(len(batch["ids"]))],
        __restore_key__=(),
        input_ids=batch["ids"],
        labels=batch["labels"],
        loss_mask=batch["mask"],
        padding_mask=torch.zeros_like(batch["ids"], dtype=torch.bool),
        pixel_values=batch["pixels"],
    )
    return partial(our_trainer(flags), micro_batch)


def seconds(step: Callable[[], float]) -> float:
    """Returns the wall-clock time of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    """Times the pairs and prints the table."""
    options = parse()
    pairs = 3 if options.quick else options.pairs
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost")
    os.environ.setdefault("MASTER_PORT", "29541")
    from megatron_smar import runtime

    runtime.install_or_exit()
    import torch

    torch.set_num_threads(options.threads)
    hf = hugging_face_model(options)
    with tempfile.TemporaryDirectory() as folder:
        hf.model.vision_tower.save_pretrained(folder)
        if options.lengths == "llava":
            run_mixture(options, hf, our_trainer([*our_flags(options, folder), *ONE_PACK]), their_trainer(hf), pairs)
            return
        batch = make_batch(options)
        ours = our_step(our_flags(options, folder), batch)
    theirs = their_step(hf, batch)
    for step in (ours, theirs, ours, theirs):  # warm up, so that all buffers and both optimizers' states exist
        step()
    rows = []
    for pair in range(pairs):
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        times = {step: seconds(step) for step in order}
        rows.append((times[ours], times[theirs]))
        print(f"pair {pair + 1}/{pairs}: ours {times[ours]:.3f} s, theirs {times[theirs]:.3f} s", flush=True)
    tokens = options.micro_batch_size * options.seq_length
    report(options, hf, [(tokens / ours, tokens / theirs) for ours, theirs in rows])


def run_all(step: Callable[[Any], float], batches: Sequence[Any]) -> float:
    """Trains on one batch after another; returns the last loss."""
    return [step(batch) for batch in batches][-1]


def run_mixture(
    options: argparse.Namespace,
    hf: Any,
    ours: Callable[[Any], float],
    theirs: Callable[[dict[str, Any]], float],
    rounds: int,
) -> None:
    """Times rounds of the same samples, packed and padded, in turns."""
    from mixed_lengths import draw_samples, packed, padded  # benchmarks/mixed_lengths.py

    samples = draw_samples(options.samples * (rounds + 1), IMAGE_SIZE, VOCABULARY, options.seq_length)
    rows = []
    for number in range(rounds + 1):  # the first round warms up
        of_round = samples[number * options.samples :][: options.samples]
        packs = packed(of_round, options.seq_length)
        batches = padded(of_round, options.micro_batch_size, seed=number)
        work = {"ours": partial(run_all, ours, packs), "theirs": partial(run_all, theirs, batches)}
        times = {name: seconds(work[name]) for name in (sorted(work) if number % 2 else sorted(work, reverse=True))}
        tokens = sum(len(sample.ids) for sample in of_round)
        fill = tokens / sum(batch["input_ids"].numel() for batch in batches)
        print(
            f"round {number}/{rounds}: {len(packs)} packs {tokens / (len(packs) * options.seq_length):.1%} full in "
            f"{times['ours']:.1f} s, {len(batches)} padded batches {fill:.1%} full in {times['theirs']:.1f} s",
            flush=True,
        )
        if number:
            rows.append((tokens / times["ours"], tokens / times["theirs"]))
    report(options, hf, rows)


def report(options: argparse.Namespace, hf: Any, rows: list[tuple[float, float]]) -> None:
    """Prints the table, and the JSON object if asked for.

    Args:
        options: The command line.
        hf: Hugging Face's model.
        rows: Tokens per second of each pair: ours, theirs.
    """
    ratios = sorted(ours / theirs for ours, theirs in rows)
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    result = {
        "ratio": median,
        "ratio_quartiles": [round(lower, 3), round(upper, 3)],
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "tokens_per_second": statistics.median(ours for ours, _ in rows),
        "tokens_per_second_transformers": statistics.median(theirs for _, theirs in rows),
        "parameters": sum(p.numel() for p in hf.parameters()),
        "threads": options.threads,
        "dtype": "bfloat16" if options.bf16 else "float32",
        "lengths": options.lengths,
        "skips_unused_experts": not options.all_experts,
        "pairs": len(rows),
    }
    for name, value in result.items():
        print(f"{name:32} {value:,.3f}" if isinstance(value, float) else f"{name:32} {value}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
