# SPDX-License-Identifier: Apache-2.0
"""Cost of SMAR in a training step, compared with Megatron's own global load balancing.

    python benchmarks/smar_overhead.py [--shape demo mixtral] [--ranks 2] [--quick] [--json]

One model per shape, with expert parallelism over all ranks (the program starts itself under torchrun), is trained by
Megatron's `train_step` on one batch in three settings, which alternate step by step:

    none             Megatron's router without this project's code: an attribute `routing` on each live router calls
                     `TopKRouter.routing` directly. No bias, no statistics, no loss; `finish` then returns its input.
    smar             that attribute is removed: the router's own code, as in training with `--modality-routing smar`,
                     with statistics over all ranks.
    global_aux_loss  like none, but the router's `routing_type` is `global_aux_loss` instead of `none`: Megatron reads
                     it in each forward pass, and the model is built with that loss, so its buffers exist.

All three run in the same process on the same weights, optimizer and process groups. The order alternates (ABC, CBA), so
that drift cancels. The result is the median over triples of the ratio to `none`, with quartiles. A step is one
`train_step`: forward, backward, reductions and optimizer, without the loader and without what is logged once per step.

Single steps vary by more than SMAR costs, so SMAR's parts are also measured in separate steps, by events around the
real functions (`torch.cuda.Event`: the device's time on CUDA; on the CPU the runtime replaces it by the host's clock).
The extra backward pass is timed separately, on the routers' tensors of a real step. `global_aux_loss` waits for the
other ranks inside the router, so its sum includes their lag, for which the other settings wait in the dispatch.
Collectives and operations are counted in torch's dispatcher. The CUDA code has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

IMAGE_TOKEN, IMAGE_SIZE, PATCH = 5, 64, 8
TOKENS_PER_TILE = (IMAGE_SIZE // PATCH // 2) ** 2
SETTINGS = ("none", "smar", "global_aux_loss")
LIMIT_SECONDS = 150.0  # time limit for a shape's triples, on a slow or busy machine
QUICK_LIMIT_SECONDS = 8.0


@dataclass(frozen=True)
class Shape:
    """A model and its batch.

    Attributes:
        micro_batch_size: Samples per rank and step.
        triples: Number of timed triples of steps, if they take no more than LIMIT_SECONDS.
        quick_triples: The same with --quick.
    """

    hidden: int
    ffn: int
    layers: int
    seq_length: int
    micro_batch_size: int
    vocabulary: int
    triples: int
    quick_triples: int
    heads: int = 8
    groups: int = 4
    experts: int = 8
    top_k: int = 2


SHAPES = {
    "demo": Shape(128, 320, 4, 128, 8, 2048, triples=80, quick_triples=6, heads=4, groups=2),
    # A layer of Mixtral 8x7B at an eighth of its width. The vocabulary is small, so that the layer dominates the step.
    "mixtral": Shape(512, 1792, 1, 512, 2, 512, triples=60, quick_triples=4),
}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="Default: all.")
    parser.add_argument("--ranks", type=int, default=2, help="Processes; expert-parallel size. Default: %(default)s.")
    parser.add_argument("--triples", type=int, help="Triples of timed steps, instead of the shape's own number.")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32.")
    parser.add_argument("--quick", action="store_true", help="Few triples, within a minute.")
    parser.add_argument("--json", action="store_true", help="One JSON object as the last line.")
    options = parser.parse_args()
    options.ranks = int(os.environ.get("WORLD_SIZE", options.ranks))
    experts = min(SHAPES[name].experts for name in options.shape)
    if options.ranks < 2 or experts % options.ranks:
        parser.error(f"--ranks {options.ranks} cannot share {experts} experts out; give 2, 4 or 8.")
    if options.triples is not None and options.triples < 2:
        parser.error(f"--triples {options.triples} gives no quartiles; give 2 or more.")
    return options


def relaunch(ranks: int) -> None:
    """Replaces this process by torchrun with the same command line."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # ranks that wait must not spin
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launch, *sys.argv])


def flags(shape: Shape, ranks: int, vision_path: str, bf16: bool) -> list[str]:
    """Returns Megatron's flags for the model; the tiny learning rate keeps routing the same in all settings."""
    return f"""
        --vision-model {vision_path} --image-size {IMAGE_SIZE} --connector mlp2x_gelu --modality-routing smar
        --num-layers {shape.layers} --hidden-size {shape.hidden} --ffn-hidden-size {shape.ffn}
        --num-attention-heads {shape.heads} --group-query-attention --num-query-groups {shape.groups}
        --num-experts {shape.experts} --moe-router-topk {shape.top_k} --expert-model-parallel-size {ranks}
        --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01
        --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm --disable-bias-linear
        --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --seq-length {shape.seq_length} --max-position-embeddings {shape.seq_length}
        --micro-batch-size {shape.micro_batch_size} --global-batch-size {shape.micro_batch_size * ranks}
        --train-iters 100000 --lr 1e-8 --clip-grad 1.0 --weight-decay 0 --use-distributed-optimizer
        --tokenizer-type NullTokenizer --vocab-size {shape.vocabulary} --make-vocab-size-divisible-by 1
        --no-check-for-nan-in-loss-and-grad {"--bf16" if bf16 else ""}
    """.split()


def save_vision_model(folder: str) -> None:
    """Saves a small vision encoder, which is frozen and the same in every setting."""
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = InternVLVisionConfig(**sizes, image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH, PATCH])
    InternVLVisionModel(config).save_pretrained(folder)


def make_batch(shape: Shape, seed: int) -> Any:
    """Returns one micro-batch, different on each rank: each sequence is an image followed by random text."""
    import torch

    from megatron_smar.data.batch import VisionLanguageBatch

    generator = torch.Generator().manual_seed(seed)
    size = (shape.micro_batch_size, shape.seq_length)
    ids = torch.randint(6, shape.vocabulary, size, generator=generator)
    ids[:, 1 : 1 + TOKENS_PER_TILE] = IMAGE_TOKEN
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    return VisionLanguageBatch(
        __key__=[str(row) for row in range(shape.micro_batch_size)],
        __restore_key__=(),
        input_ids=ids,
        labels=labels,
        loss_mask=(labels != IMAGE_TOKEN).float(),
        padding_mask=torch.zeros(size, dtype=torch.bool),
        pixel_values=torch.randn(shape.micro_batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    )


def megatron_routing(router: Any, logits: Any, padding_mask: Any) -> Any:
    """Runs Megatron's router on this project's model, with the padding that the modality mask [s, b, M] implies."""
    from megatron.core.transformer.moe.router import TopKRouter

    return TopKRouter.routing(router, logits, padding_mask=~padding_mask.any(dim=-1))


class Training:
    """A model with its optimizer on this rank, trained on one batch in a setting that can be changed between steps.

    Attributes:
        step: Runs one training step.
        routers: Routers of all MoE layers.
    """

    def __init__(self, shape: Shape, ranks: int, vision_path: str, bf16: bool) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.utils import get_model_config
        from megatron.training import get_args
        from megatron.training.training import train_step

        from megatron_smar.routing.router import ModalityAwareRouter
        from megatron_smar.training.providers import make_forward_step
        from megatron_smar.training.setup import start

        model, optimizer, scheduler = start(flags(shape, ranks, vision_path, bf16))
        get_args().curr_iteration = 0
        config = get_model_config(model[0])
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        batch = make_batch(shape, seed=2 + get_args().rank)
        iterator = RerunDataIterator(iter(functools.partial(lambda: batch), None))
        forward_step = make_forward_step([IMAGE_TOKEN], TOKENS_PER_TILE)
        arguments = (forward_step, iterator, model, optimizer, scheduler, config, get_forward_backward_func())
        for chunk in model:
            chunk.train()
        self.step: Callable[[], Any] = functools.partial(train_step, *arguments, iteration=0)
        modules = [module for chunk in model for module in chunk.modules()]
        self.routers: list[Any] = [module for module in modules if isinstance(module, ModalityAwareRouter)]

    def use(self, setting: str) -> None:
        """Switches the live routers to one of SETTINGS; see the program's docstring."""
        for router in self.routers:
            router.__dict__.pop("routing", None)
            if setting != "smar":
                router.routing = functools.partial(megatron_routing, router)
            router.routing_type = "global_aux_loss" if setting == "global_aux_loss" else "none"

    def seconds(self, setting: str) -> float:
        """Returns the wall-clock time of one step on this rank; all ranks begin together."""
        import torch

        self.use(setting)
        torch.distributed.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin


class Stopwatch:
    """Accumulates the device's time in functions, by name."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with an event recorded before and after each call."""
        import torch

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = function(*args, **kwargs)
            end.record()
            self._spans[name].append((begin, end))
            return result

        return call

    @contextmanager
    def watching(self, functions: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Measures methods within the context.

        Args:
            functions: Class and name of each method, by the name under which its time is accumulated.
        """
        with ExitStack() as stack:
            for name, (owner, attribute) in functions.items():
                stack.enter_context(patch.object(owner, attribute, self.measured(name, getattr(owner, attribute))))
            yield

    def take(self) -> dict[str, float]:
        """Returns the seconds by name since the last call; 0 for functions that did not run."""
        import torch

        torch.cuda.synchronize()
        spans, self._spans = self._spans, defaultdict(list)
        seconds = {name: sum(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in spans.items()}
        return defaultdict(float, seconds)


def slowest(values: list[float]) -> list[float]:
    """Returns the largest of each value over the ranks."""
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def time_triples(training: Training, name: str, triples: int, limit: float) -> dict[str, list[float]]:
    """Returns the slowest rank's seconds of every timed step, by setting; ends early after `limit` seconds."""
    import torch
    from tqdm import tqdm

    times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for setting in SETTINGS:  # warm up, so that every buffer and the optimizer's state exist
        training.seconds(setting)
    for triple in tqdm(range(triples), desc=f"{name}: triples", disable=torch.distributed.get_rank() > 0):
        for setting in SETTINGS if triple % 2 == 0 else reversed(SETTINGS):
            times[setting].append(training.seconds(setting))
        spent = sum(map(sum, times.values()))
        if triple > 0 and slowest([spent])[0] > limit:  # the same value on all ranks, so that they stop together
            break
    return {setting: slowest(values) for setting, values in times.items()}


def time_parts(training: Training, rounds: int) -> dict[str, float]:
    """Returns seconds per step in the parts of SMAR's forward pass and in `global_aux_loss`; median, slowest rank."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_smar.routing.modality_bias import ModalityBias
    from megatron_smar.routing.router import ModalityAwareRouter
    from megatron_smar.routing.statistics import PendingStatistics

    watch, rows = Stopwatch(), defaultdict(list)
    functions: dict[str, tuple[Any, str]] = {
        "megatron": (TopKRouter, "routing"),
        "routing": (ModalityAwareRouter, "routing"),
        "bias": (ModalityBias, "forward"),
        "launch": (PendingStatistics, "__init__"),
        "wait": (PendingStatistics, "wait"),
        "finish": (ModalityAwareRouter, "finish"),
    }
    with watch.watching(functions):
        for _ in range(rounds):
            taken = {}
            for setting in SETTINGS:
                training.seconds(setting)
                taken[setting] = watch.take()
            smar = taken["smar"]
            rows["modality_bias"].append(smar["bias"])
            rows["statistics"].append(smar["routing"] - smar["megatron"] - smar["bias"] - smar["launch"])
            rows["launch"].append(smar["launch"])
            rows["exposed_wait"].append(smar["wait"])
            rows["distance_and_loss"].append(smar["finish"] - smar["wait"])
            rows["global_aux_loss"].append(taken["global_aux_loss"]["megatron"] - taken["none"]["megatron"])
    return dict(zip(rows, slowest([statistics.median(values) for values in rows.values()]), strict=True))


def time_backward(training: Training, rounds: int) -> dict[str, float]:
    """Returns the seconds that each setting adds to the backward pass of all routers; median, slowest rank.

    Measured from the router's probabilities to its logits and its bias, on the tensors of a real step.
    """
    import torch

    from megatron_smar.routing.router import ModalityAwareRouter

    inputs: list[tuple[Any, Any, Any]] = []
    original = ModalityAwareRouter.routing

    def remember(router: Any, logits: Any, padding_mask: Any = None) -> Any:
        inputs.append((router, logits.detach(), padding_mask))
        return original(router, logits, padding_mask)

    with patch.object(ModalityAwareRouter, "routing", remember):
        training.seconds("smar")
    watch, rows = Stopwatch(), defaultdict(list)
    for _ in range(rounds):
        for setting in SETTINGS:
            training.use(setting)
            for router, logits, mask in inputs:
                leaf = logits.clone().requires_grad_()
                leaves = [leaf, router.modality_bias.bias] if setting == "smar" else [leaf]
                output = router.finish(router.routing(leaf, mask)[0])
                watch.measured(setting, torch.autograd.grad)(output, leaves, torch.ones_like(output))
            for name, value in watch.take().items():
                rows[name].append(value)
    medians = [statistics.median(rows[setting]) for setting in SETTINGS]
    none, *others = slowest(medians)
    return {setting: other - none for setting, other in zip(SETTINGS[1:], others, strict=True)}


def count(training: Training) -> dict[str, dict[str, float]]:
    """Counts what one step dispatches per MoE layer in excess of the setting `none`, by setting.

    Returns:
        `collectives`; `floats`, the number of floats that they reduce; `operations`, in forward and backward without
        views, which is about the number of kernels on a GPU.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts = dict.fromkeys(("collectives", "floats", "operations"), 0)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                self.counts["collectives"] += 1
                if "allreduce" in func.__name__:
                    self.counts["floats"] += sum(tensor.numel() for tensor in args[0])
            elif not func.is_view:
                self.counts["operations"] += 1
            return func(*args, **(kwargs or {}))

    counts = {}
    for setting in SETTINGS:
        training.use(setting)
        with Counter() as counter:
            training.step()
        counts[setting] = counter.counts
    none, layers = counts["none"], len(training.routers)  # one micro-batch per step
    return {
        setting: {name: (value - none[name]) / layers for name, value in counts[setting].items()}
        for setting in SETTINGS[1:]
    }


def percent_over(times: list[float], base: list[float]) -> tuple[float, list[float]]:
    """Returns median and quartiles, in percent, of how much longer steps took than the base steps of their triples."""
    overheads = [100 * (time / of - 1) for time, of in zip(times, base, strict=True)]
    lower, median, upper = statistics.quantiles(overheads, n=4, method="inclusive")
    return median, [lower, upper]


def measure(name: str, options: argparse.Namespace, vision_path: str) -> dict[str, Any]:
    """Measures one shape; the results are the same on all ranks."""
    shape = SHAPES[name]
    training = Training(shape, options.ranks, vision_path, options.bf16)
    triples = options.triples or (shape.quick_triples if options.quick else shape.triples)
    limit = QUICK_LIMIT_SECONDS if options.quick else LIMIT_SECONDS
    times = time_triples(training, name, triples, limit)
    rounds = max(2, len(times["none"]) // 4)
    parts, backward = time_parts(training, rounds), time_backward(training, 10 * rounds)
    counts = count(training)
    step = statistics.median(times["none"])
    balance = parts.pop("global_aux_loss") + backward["global_aux_loss"]
    breakdown = {part: 100 * value / step for part, value in (parts | {"extra_backward": backward["smar"]}).items()}
    smar, smar_quartiles = percent_over(times["smar"], times["none"])
    other, other_quartiles = percent_over(times["global_aux_loss"], times["none"])
    return {
        "step_overhead_percent": smar,
        "step_overhead_quartiles": smar_quartiles,
        "global_aux_loss_overhead_percent": other,
        "global_aux_loss_overhead_quartiles": other_quartiles,
        "exposed_wait_percent": breakdown["exposed_wait"],
        "breakdown_percent": breakdown,
        "breakdown_sum_percent": sum(breakdown.values()),
        "global_aux_loss_sum_percent": 100 * balance / step,
        "collectives_per_layer": counts["smar"]["collectives"],
        "floats_per_layer": counts["smar"]["floats"],
        "operations_per_layer": counts["smar"]["operations"],
        "global_aux_loss_collectives_per_layer": counts["global_aux_loss"]["collectives"],
        "global_aux_loss_operations_per_layer": counts["global_aux_loss"]["operations"],
        "step_seconds": step,
        "triples": len(times["none"]),
        "tokens_per_rank": shape.micro_batch_size * shape.seq_length,
        "shape": asdict(shape),
    }


def forget_megatron() -> None:
    """Resets Megatron's global state, so that this process can initialize another model."""
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import unset_global_variables

    unset_global_variables()
    destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()


def print_table(name: str, result: dict[str, Any], ranks: int) -> None:
    """Prints the results of one shape."""
    step, layers = result["step_seconds"], result["shape"]["layers"]
    print(f"\n{name}: {ranks} ranks, {result['tokens_per_rank']} tokens each, MoE layers: {layers}; step {step:.3f} s")
    print(f"{'over no auxiliary loss, median of ' + str(result['triples']) + ' triples':44}      %   quartiles")
    for label, key in (("SMAR", "step_overhead"), ("global_aux_loss", "global_aux_loss_overhead")):
        lower, upper = result[f"{key}_quartiles"]
        print(f"  {label:40} {result[f'{key}_percent']:8.3f}   {lower:.2f} to {upper:.2f}")
    print(f"{'parts of SMAR':44}      %   microseconds per layer")
    rows = result["breakdown_percent"] | {"sum": result["breakdown_sum_percent"]}
    for label, value in (
        rows | {"(global_aux_loss, with waiting for ranks)": result["global_aux_loss_sum_percent"]}
    ).items():
        print(f"  {label:40} {value:8.3f}   {value / 100 * step / layers * 1e6:.0f}")
    print(f"{'added per layer and micro-batch':44}   SMAR   global_aux_loss")
    for label, key in (("collectives", "collectives_per_layer"), ("operations", "operations_per_layer")):
        print(f"  {label:40} {result[key]:8g}   {result[f'global_aux_loss_{key}']:g}")
    print(f"  {'floats all-reduced by SMAR':40} {result['floats_per_layer']:8g}")


def main() -> None:
    """Measures every shape and prints the tables."""
    options = parse()
    if "WORLD_SIZE" not in os.environ:
        relaunch(options.ranks)
    from megatron_smar import runtime

    device = runtime.install()
    import torch

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_vision_model(folder)  # by each rank separately, before there are process groups
        for name in options.shape:
            results[name] = measure(name, options, folder)
            forget_megatron()
    if torch.distributed.get_rank() == 0:
        for name, result in results.items():
            print_table(name, result, options.ranks)
        if options.json:
            top = results.get("mixtral", results[options.shape[0]])
            scalars = {key: value for key, value in top.items() if isinstance(value, float)}
            settings = {"ranks": options.ranks, "device": device, "dtype": "bfloat16" if options.bf16 else "float32"}
            print(json.dumps(scalars | settings | {"shapes": results}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
