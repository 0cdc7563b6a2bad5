# SPDX-License-Identifier: Apache-2.0
"""Runs one model on expert-parallel groups of 1, 2 and 4 ranks, and compares what is counted with what is sent.

torchrun --nproc-per-node 4 dispatches.py FOLDER

Under each layout the ranks evaluate their share of the same samples. FOLDER/sent.pt holds by number of ranks, over all
batches, the copies counted from home to device and, from Megatron's own dispatcher, its splits and the bytes that it
hands to the all-to-all for other ranks. One process counts for 2 and 4 devices too (`counted_for`).
"""

import sys
from pathlib import Path
from typing import Any

from megatron_smar import runtime

runtime.install()

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from megatron_smar.data.batch import EncodedSample
from megatron_smar.evaluation.evaluator import Evaluator
from megatron_smar.placement.dispatch import DispatchCounter, counted
from megatron_smar.placement.report import device_of
from tests.models import build_model, save_tower

EXPERTS, LAYERS, SAMPLES, IMAGE, TOKENS_PER_TILE = 8, 3, 13, 5, 4
SIZES = (1, 2, 4)
NAME = "after"


def make_samples() -> list[EncodedSample]:
    """Makes samples of different lengths, every second one with an image."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number in range(SAMPLES):
        ids = torch.randint(6, 128, (12 + number,), generator=generator)
        tiles = torch.randint(0, 256, (number % 2, 3, 32, 32), generator=generator, dtype=torch.uint8)
        if number % 2:
            ids[2 : 2 + TOKENS_PER_TILE] = IMAGE
        samples.append(
            EncodedSample(
                __key__=str(number),
                __restore_key__=(),
                input_ids=ids,
                labels=ids.roll(-1),
                loss_mask=torch.ones(len(ids)),
                pixel_values=tiles,
                num_images=number % 2,
            )
        )
    return samples


class Sent:
    """Records what Megatron's dispatchers hand to the all-to-all, through the function that they call for it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.splits: list[tuple[list[int], list[int]]] = []
        self.bytes: list[int] = []
        self._send = token_dispatcher.all_to_all
        self.layers = sum(hasattr(module, "token_dispatcher") for module in model.modules())

    def __enter__(self) -> "Sent":
        token_dispatcher.all_to_all = self.send
        return self

    def __exit__(self, *_: object) -> None:
        token_dispatcher.all_to_all = self._send

    def send(self, group: dist.ProcessGroup, tensor: Tensor, received: Any, given: Any, **options: Any) -> Tensor:
        """Records the call, and makes it."""
        if given is not None and tensor.dim() == 2:  # hidden states; routing weights, a number per copy, go with them
            inputs, outputs = ([int(n) for n in splits] for splits in (given, received))
            self.splits.append((inputs, outputs))
            away = sum(inputs) - inputs[group.rank()]
            self.bytes.append(away * tensor.shape[1] * tensor.element_size())
        return self._send(group, tensor, received, given, **options)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Returns the input splits, output splits and bytes of a layer's dispatches, which alternate with combines."""
        calls = range(2 * (layer - 1), len(self.splits), 2 * self.layers)
        inputs, outputs = (torch.tensor([self.splits[n][kind] for n in calls]).sum(dim=0) for kind in (0, 1))
        return inputs, outputs, sum(self.bytes[n] for n in calls)


def measure(ranks: int, tower: str) -> dict[str, Any]:
    """Evaluates the samples with the experts of each layer on `ranks` ranks."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(5)
    model = build_model(tower, num_moe_experts=EXPERTS).double()
    evaluator = Evaluator(model, [IMAGE], TOKENS_PER_TILE, 0, batch_size=2)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    places = {number: {layer: device_of(range(EXPERTS), number) for layer in range(1, LAYERS + 1)} for number in SIZES}
    counter = DispatchCounter({str(number): places[number] for number in (SIZES[1:] if ranks == 1 else (ranks,))})

    def announce(rows: list[int]) -> None:
        counter.rows = [groups.ep.rank() if ranks > 1 else groups.dp.rank()] * len(rows)  # their real home

    with Sent(model) as sent, counted([model], counter):
        evaluator.route(make_samples(), "samples", announce)
    counter.reduce([groups.dp])
    found: dict[str, Any] = {
        "counted_for": {
            int(name): {layer: traffic.copies.long() for layer, traffic in by_layer.items()}
            for name, by_layer in counter.traffic.items()
        }
    }
    if ranks > 1:
        found |= {"counted": found["counted_for"][ranks], "input_splits": {}, "output_splits": {}, "bytes_sent": {}}
        found["bytes_per_copy"] = model.config.hidden_size * torch.float64.itemsize
        for layer in range(1, LAYERS + 1):
            inputs, outputs, number = sent.of_layer(layer)
            splits = torch.zeros(2, ranks, ranks, dtype=torch.long)
            splits[0, groups.ep.rank()], splits[1, :, groups.ep.rank()] = inputs, outputs
            total = torch.tensor(number)
            dist.all_reduce(splits)
            dist.all_reduce(total)
            found["input_splits"][layer], found["output_splits"][layer] = splits
            found["bytes_sent"][layer] = int(total)
    parallel_state.destroy_model_parallel()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        save_tower(folder / "tower")
    dist.barrier()
    found = {ranks: measure(ranks, str(folder / "tower")) for ranks in SIZES}
    if dist.get_rank() == 0:
        torch.save(found, folder / "sent.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
