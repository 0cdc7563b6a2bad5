# SPDX-License-Identifier: Apache-2.0
"""Decodes the same prompts with the cache under several layouts, and compares with logits that are recomputed.

torchrun --nproc-per-node N decoding.py FOLDER

FOLDER/decoded.json holds by layout the new tokens of all prompts, the largest difference between the cached logits of
this rank's rows and the recomputed ones, and how many logits were compared.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_smar import runtime

runtime.install()

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_smar.data.batch import EncodedSample
from megatron_smar.evaluation.evaluator import Evaluator
from megatron_smar.evaluation.generation import generate
from tests.distributed.dispatches import IMAGE, TOKENS_PER_TILE, make_samples
from tests.models import build_model, save_tower

TP, SP, EP, ETP = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
LATENT = dict(
    multi_latent_attention=True,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_head_dim=12,
    qk_pos_emb_head_dim=8,
    v_head_dim=16,
    rope_type="rope",
    num_query_groups=4,
)
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "replicas": {},
        "tensor": {TP: 2, ETP: 1},
        "tensor, sequence": {TP: 2, SP: True, ETP: 1},
        "tensor, sequence, sharded experts": {TP: 2, SP: True},
        "experts": {EP: 2},
        "latent, replicas": LATENT,
        "latent, tensor, sequence": {TP: 2, SP: True, ETP: 1} | LATENT,
        "latent, experts": {EP: 2} | LATENT,
        "experts over tensor ranks": {TP: 2, SP: True, EP: 2, ETP: 1},
    },
    4: {
        "replicas": {},
        "tensor, sequence, experts": {TP: 2, SP: True, EP: 2, ETP: 1},
        "tensor, sequence, experts over all": {TP: 2, SP: True, EP: 4, ETP: 1},
    },
}
LIMITS = [3, 9, 1, 4, 6, 0, 2]  # uneven: replicas are done at different times


class Passes:
    """Records the last position's logits of each pass, by prompt."""

    def __init__(self) -> None:
        self.prompts: list[list[Tensor]] = []

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            self.prompts.append([])
        self.prompts[-1].append(output[0, -1].detach().clone())


def recomputed(evaluator: Evaluator, prompt: EncodedSample, new: list[int]) -> Tensor:
    """Returns the logits after the prompt and after each new token, from one pass without a cache."""
    ids = torch.cat([prompt.input_ids, torch.tensor(new, dtype=torch.int64)])
    fields = {"input_ids": ids, "labels": ids, "loss_mask": torch.zeros(len(ids))}
    sample = EncodedSample.derive_from(prompt, pixel_values=prompt.pixel_values, **fields)
    return evaluator._gather(evaluator._logits([sample])[0])[0, len(prompt.input_ids) - 1 :]


def decode(layout: dict[str, Any], tower: str) -> dict[str, Any]:
    """Builds the model under one layout and decodes."""
    sizes = {name: size for name, size in layout.items() if name in (TP, EP, ETP)}
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(5)
    model = build_model(tower, params_dtype=torch.float64, **layout).double()
    for parameter in model.language_model.output_layer.parameters():
        parameter.data.mul_(20)
    shards = layout.get(TP, 1) if SP in layout else 1
    evaluator = Evaluator(model, [IMAGE], TOKENS_PER_TILE, 0, multiple_of=shards, batch_size=1)
    prompts = make_samples()[: len(LIMITS)]
    passes = Passes()
    handle = model.register_forward_hook(passes, with_kwargs=True)
    one_by_one = generate(evaluator, prompts, LIMITS, lambda number, new: False)
    handle.remove()
    evaluator.batch_size = 3
    together = generate(evaluator, prompts, LIMITS, lambda number, new: False)
    assert together == one_by_one
    full = [recomputed(evaluator, prompt, new) for prompt, new in zip(prompts, together, strict=True)]
    compared = [
        (logits, full[number][step])
        for number, seen in _of_prompts(passes, evaluator.groups.dp, len(prompts))
        for step, logits in enumerate(seen[: LIMITS[number]])
    ]
    differences = [float((a - b).abs().max()) for a, b in compared]
    found = {"new": together, "difference": max(differences, default=0.0), "compared": len(compared)}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    parallel_state.destroy_model_parallel()
    return {
        "new": [part["new"] for part in gathered],
        "difference": max(part["difference"] for part in gathered),
        "compared": sum(part["compared"] for part in gathered),
    }


def _of_prompts(passes: Passes, group: dist.ProcessGroup, number: int) -> list[tuple[int, list[Tensor]]]:
    """Returns the numbers of this rank's prompts with their logits: the longest prompts were decoded first."""
    mine = list(range(number))[group.rank() :: group.size()][::-1]
    return list(zip(mine, passes.prompts, strict=True))


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        save_tower(folder / "tower")
    dist.barrier()
    layouts = LAYOUTS[dist.get_world_size()]
    found = {name: decode(layout, str(folder / "tower")) for name, layout in layouts.items()}
    if dist.get_rank() == 0:
        (folder / "decoded.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
