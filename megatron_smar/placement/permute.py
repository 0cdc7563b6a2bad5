# SPDX-License-Identifier: Apache-2.0
"""Moves the experts of a torch_dist checkpoint to other places, one tensor at a time.

Renumbering the experts of a layer changes nothing that the model computes: the router's rows and everything else that
counts experts is renumbered with the experts' weights, and so is the optimizer's state, which has the same names and
shapes as the weights.
"""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from torch import Tensor

from megatron_smar.checkpoint.expert_order import ExpertOrder, record, recorded
from megatron_smar.checkpoint.folders import ConversionError, whole_or_nothing
from megatron_smar.checkpoint.metadata import COMMON_STATE, saved_arguments
from megatron_smar.checkpoint.torch_dist import CheckpointReader, Shard, pickled, write_contents
from megatron_smar.config.build import modality_table
from megatron_smar.placement.plan import Plan, composed, inverse
from megatron_smar.routing.strategies import STRATEGIES, StrategyConfig

ROUTER = re.compile(r"(.*\.layers\.)(?:(\d+)\.)?(mlp\.router\.)(.+)")
_EXPERTS = re.compile(r".*\.layers\.(?:(\d+)\.)?mlp\.experts\.(.+)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.\w+\.(.+)")
_OBJECT = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
# The axis that counts experts, without the layers in front, of each weight and buffer of Megatron's router and this
# project's, except for the strategies' own.
_ROUTER_AXES = {"weight": 0, "bias": 0, "expert_bias": 0, "qb_beta": 0, "modality_bias.bias": 1}
STATE = "strategy."


@dataclass(frozen=True)
class Axis:
    """Where a tensor counts experts.

    Attributes:
        number: The axis that counts experts.
        layer: The layer's number, from 1; None for a tensor of all layers, with axis 0 for them.
    """

    number: int
    layer: int | None


class PlacedCheckpoint:
    """A checkpoint whose experts can be moved.

    Args:
        directory: The folder that --load names.
        iteration: The checkpoint's step; None for the latest checkpoint.

    Raises:
        ValueError: There is no such checkpoint, it is damaged, or its experts cannot be moved.
    """

    def __init__(self, directory: Path, iteration: int | None = None) -> None:
        self.reader = CheckpointReader(directory, iteration)
        self.args: Namespace = saved_arguments(self.reader.common_state)
        self.name = f"--load {directory}"
        if not getattr(self.args, "num_experts", None):
            raise ValueError(f"{self.name} holds a dense model, which has no experts to place; give a mixture's.")
        self.num_experts: int = self.args.num_experts
        name = getattr(self.args, "modality_routing", "none")
        if name not in STRATEGIES:
            raise ValueError(
                f"{self.name} was trained with --modality-routing {name}, and this version knows "
                f"{', '.join(STRATEGIES)}; take the version that trained it."
            )
        self.strategy: type[StrategyConfig] = STRATEGIES[name]
        self.order = recorded(self.args)
        self.layers = self._moe_layers()

    def _moe_layers(self) -> list[int]:
        weights = [m for m in map(ROUTER.fullmatch, self.reader.tensors) if m and m[4] == "weight" and _is_model(m[0])]
        if any(match[2] is None for match in weights):
            return list(range(1, self.args.num_layers + 1))
        return sorted(int(match[2]) + 1 for match in weights)

    def state(self, name: str) -> dict[int, Tensor]:
        """Returns a tensor of the strategy's state by layer; empty where the checkpoint has none of this name."""
        found: dict[int, Tensor] = {}
        for key in filter(_is_model, self.reader.tensors):
            match = ROUTER.fullmatch(key)
            if match and match[4] == STATE + name:
                tensor = self.whole(key)
                found |= {int(match[2]) + 1: tensor} if match[2] else dict(enumerate(tensor, start=1))
        return found

    def whole(self, key: str) -> Tensor:
        """Returns a whole tensor."""
        sizes = tuple(self.reader.tensors[key].size)
        return self.reader.read(key, (0,) * len(sizes), sizes)

    def check_movable(self) -> None:
        """Checks that the model's flags and the optimizer's sharding allow moving experts.

        Raises:
            ConversionError: They do not; nothing was written.
        """
        if getattr(self.args, "moe_router_num_groups", None):
            raise ConversionError(
                f"{self.name} was trained with --moe-router-num-groups {self.args.moe_router_num_groups}: a group is a "
                "run of neighboring experts, so that moved experts would compete in other groups; it cannot be placed."
            )
        if getattr(self.args, "mtp_num_layers", None):
            raise ConversionError(
                f"{self.name} has --mtp-num-layers {self.args.mtp_num_layers}: the experts of multi-token prediction "
                "layers cannot be placed."
            )
        kind = (self.reader.common_state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
        if kind not in (None, "fully_reshardable"):
            raise ConversionError(
                f"{self.name} has the optimizer's state as it was sharded over ranks ({kind}); save it without "
                "--no-dist-ckpt-optim-fully-reshardable, or without the state (--no-save-optim)."
            )

    def check_plan(self, plan: Plan) -> None:
        """Checks that a plan is for this model, and for the present numbers of its experts.

        Raises:
            ConversionError: It is not.
        """
        if plan.num_experts != self.num_experts or list(plan.orders) != self.layers:
            raise ConversionError(
                f"--plan is for {plan.num_experts} experts in layers {_numbers(plan.orders)}, and {self.name} has "
                f"{self.num_experts} in layers {_numbers(self.layers)}; plan for this checkpoint."
            )
        if plan.numbering != (self.order.layers if self.order else {}):
            raise ConversionError(
                f"--plan was made for other numbers of the experts than they have in {self.name}, which a placement "
                "has changed before or since; plan for this checkpoint."
            )

    def places_before(self, layer: int) -> list[int]:
        """Returns the expert, by its present number, that was first at place 0, 1, ..."""
        assert self.order is not None
        return list(inverse(self.order.layers[layer]))

    def axis(self, key: str) -> Axis | None:
        """Returns where a tensor counts experts; None if it does not.

        Raises:
            ConversionError: Nothing is known of a tensor that belongs to the experts, the router or the optimizer.
        """
        weight = key
        if not _is_model(key):
            match = _OPTIMIZER.fullmatch(key)
            if match is None or match[1] not in self.reader.tensors:
                raise ConversionError(f"{self.name} has {key}, an optimizer's state that belongs to no weight there.")
            weight = match[1]
        if router := ROUTER.fullmatch(weight):
            number = self._router_axis(router[4])
            return None if number is None else self._checked(key, router[2], number)
        if experts := _EXPERTS.fullmatch(weight):
            if not experts[2].startswith("experts."):
                raise ConversionError(f"{self.name} has {key}, which is not known to count experts or not to.")
            return self._checked(key, experts[1], 0)
        if weight.startswith("language_model.") and re.search(r"\.(router|experts)\.", weight):
            raise ConversionError(f"{self.name} has {key}, a weight of a router or of experts in an unknown place.")
        return None

    def _router_axis(self, name: str) -> int | None:
        if name in _ROUTER_AXES:
            return _ROUTER_AXES[name]
        known = self.strategy.expert_axes
        if name.removeprefix(STATE) not in known or not name.startswith(STATE):
            raise ConversionError(
                f"{self.name} has mlp.router.{name}, and --modality-routing {self.strategy.name} does not say whether "
                "it counts experts (expert_axes); take the version that trained it."
            )
        return known[name.removeprefix(STATE)]

    def _checked(self, key: str, layer: str | None, axis: int) -> Axis:
        number, size = axis + (layer is None), tuple(self.reader.tensors[key].size)
        if number >= len(size) or size[number] != self.num_experts or (layer is None and size[0] < max(self.layers)):
            raise ConversionError(
                f"{self.name} has {key} of shape {list(size)}, without an axis of {self.num_experts} experts."
            )
        return Axis(number, None if layer is None else int(layer) + 1)


def _is_model(key: str) -> bool:
    return not re.match(r"(chained_\d+\.)?optimizer\.", key)


def apply_plan(checkpoint: PlacedCheckpoint, plan: Plan, output: Path, progress: Callable[[int], Any]) -> ExpertOrder:
    """Writes the checkpoint with its experts at the places of a plan.

    Args:
        checkpoint: The checkpoint.
        plan: The plan, made for the experts' present numbers.
        output: New folder, for --load.
        progress: Called with the number of bytes of each tensor written.

    Returns:
        The record in the new checkpoint.

    Raises:
        ConversionError: The plan was made for another model, or the checkpoint cannot be placed.
    """
    before = checkpoint.order
    checkpoint.check_plan(plan)
    first = before.layers if before else {layer: range(plan.num_experts) for layer in plan.orders}
    layers = {layer: list(composed(first[layer], order)) for layer, order in plan.orders.items()}
    changes = _renumbered(checkpoint, plan.orders)
    settings = {name: getattr(checkpoint.args, name) for name in changes} | (before.settings if before else {})
    order = ExpertOrder(layers, plan.devices, settings)
    _write(checkpoint, plan.orders, order, changes, output, progress)
    return order


def undo(checkpoint: PlacedCheckpoint, output: Path, progress: Callable[[int], Any]) -> None:
    """Writes the checkpoint with all experts at their first places again.

    Raises:
        ConversionError: It was never placed, or cannot be written.
    """
    if checkpoint.order is None:
        raise ConversionError(f"{checkpoint.name} has no placement to undo: its experts have their first numbers.")
    orders = {layer: inverse(order) for layer, order in checkpoint.order.layers.items()}
    _write(checkpoint, orders, None, checkpoint.order.settings, output, progress)


def _renumbered(checkpoint: PlacedCheckpoint, orders: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Returns the arguments that name experts, with the experts' new numbers."""
    names = modality_table(checkpoint.args).names
    try:
        config = checkpoint.strategy.from_arguments(checkpoint.args)
        after = config.renumbered(orders, names, checkpoint.num_experts)
    except ValueError as error:
        raise ConversionError(f"{checkpoint.name} cannot be placed: {error}") from error
    fields = [field.name for field in config.flag_fields() if getattr(config, field.name) != getattr(after, field.name)]
    return {f"{config.name}_{name}": _as_parsed(getattr(after, name)) for name in fields}


def _as_parsed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write(
    checkpoint: PlacedCheckpoint,
    orders: Mapping[int, Sequence[int]],
    order: ExpertOrder | None,
    changes: Mapping[str, Any],
    output: Path,
    progress: Callable[[int], Any],
) -> None:
    checkpoint.check_movable()
    reader = checkpoint.reader
    shards = [shard for key in reader.tensors for shard in _moved(checkpoint, key, orders)]
    objects = {key: partial(reader.read_object, _source(checkpoint, key, orders)) for key in reader.objects}
    args = Namespace(**vars(checkpoint.args) | dict(changes))
    record(args, order)
    state = partial(pickled, reader.common_state | {"args": args})
    own = [key for key in objects if key.startswith(COMMON_STATE)]
    objects |= dict.fromkeys(own, state)
    if not own:
        raise ConversionError(
            f"{checkpoint.name} is of an older release of Megatron, without a common state in it; resume and save it."
        )
    needed = sum(file.stat().st_size for file in reader.folder.iterdir())
    with whole_or_nothing(output, needed) as folder:
        place = folder / reader.folder.name
        place.mkdir()
        write_contents(place, shards, objects, progress)
        is_release = place.name == "release"
        tracker = "release" if is_release else str(int(place.name.removeprefix("iter_")))
        Path(get_checkpoint_tracker_filename(str(folder))).write_text(tracker)
        _copy_neighbors(reader.folder, folder)


def _moved(checkpoint: PlacedCheckpoint, key: str, orders: Mapping[int, Sequence[int]]) -> list[Shard]:
    """Returns a tensor's parts as they are stored, each with the experts that are to be in it."""
    reader, axis = checkpoint.reader, checkpoint.axis(key)
    data = reader.tensors[key]
    shards = []
    for chunk in reader.chunks(key):
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        read = partial(reader.read, key, offsets, sizes)
        if axis is not None:
            read = partial(_read_moved, reader, key, axis, orders, offsets, sizes)
        shards.append(Shard(key, offsets, sizes, tuple(data.size), data.properties.dtype, read))
    return shards


def _read_moved(
    reader: CheckpointReader,
    key: str,
    axis: Axis,
    orders: Mapping[int, Sequence[int]],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Tensor:
    """Reads the experts that go to one part of a tensor."""
    if axis.layer is None and sizes[0] > 1:  # each layer has its own order
        parts = [(offsets[0] + n, *offsets[1:]) for n in range(sizes[0])]
        return torch.cat([_read_moved(reader, key, axis, orders, part, (1, *sizes[1:])) for part in parts])
    order = orders[axis.layer if axis.layer is not None else offsets[0] + 1]
    number = axis.number
    whole = (*offsets[:number], 0, *offsets[number + 1 :]), (*sizes[:number], len(order), *sizes[number + 1 :])
    wanted = order[offsets[number] : offsets[number] + sizes[number]]
    if sizes[number] == len(order):
        return reader.read(key, *whole).index_select(number, torch.tensor(wanted))
    one = (*sizes[:number], 1, *sizes[number + 1 :])
    rows = [reader.read(key, (*offsets[:number], expert, *offsets[number + 1 :]), one) for expert in wanted]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=number)


def _source(checkpoint: PlacedCheckpoint, key: str, orders: Mapping[int, Sequence[int]]) -> str:
    """Returns the object that goes to a key: Transformer Engine's state of an expert (FP8 scales) moves with it."""
    match, experts = _OBJECT.fullmatch(key), _EXPERTS.fullmatch(key)
    if match is None or experts is None or not _is_model(key):
        return key
    place, shape = [[int(n) for n in match[group].split(".")] for group in (2, 3)]
    axis = 0 if experts[1] else 1
    if len(shape) <= axis or shape[axis] != checkpoint.num_experts:
        raise ConversionError(f"{checkpoint.name} has {key}, which is not of one expert; it cannot be placed.")
    layer = int(experts[1]) + 1 if experts[1] else place[0] + 1
    place[axis] = orders[layer][place[axis]]
    return f"{match[1]}/shard_{'.'.join(map(str, place))}_{match[3]}"


def _copy_neighbors(source: Path, output: Path) -> None:
    """Copies what belongs to a checkpoint and is beside it: the data loaders' states, an import's config and flags."""
    for name in (f"dataloader/{source.name}", "hf"):
        if (source.parent / name).is_dir():
            shutil.copytree(source.parent / name, output / name)
    if (source.parent / "flags.txt").is_file():
        shutil.copyfile(source.parent / "flags.txt", output / "flags.txt")


def _numbers(layers: Any) -> str:
    return ", ".join(map(str, layers))
