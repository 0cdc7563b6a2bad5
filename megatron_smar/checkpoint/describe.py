# SPDX-License-Identifier: Apache-2.0
"""Describes what a torch_dist checkpoint holds, without reading any of its tensors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_smar.checkpoint.expert_order import describe_placement
from megatron_smar.checkpoint.metadata import (
    DamagedError,
    file_problems,
    find_checkpoint,
    read_common_state,
    read_contents,
    saved_arguments,
)
from megatron_smar.routing.strategies import STRATEGIES

# The arguments that each row of the description shows, under the names of their flags.
ARCHITECTURE = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels multi_latent_attention
    num_experts moe_router_topk moe_ffn_hidden_size moe_layer_freq moe_shared_expert_intermediate_size
    moe_router_score_function normalization position_embedding_type rotary_base max_position_embeddings
    padded_vocab_size untie_embeddings_and_output_weights vision_model image_size connector vision_feature_layer
    vision_feature_scale
""".split()
LAYOUT = """
    world_size tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size data_parallel_size sequence_parallel
    use_distributed_optimizer
""".split()
ROUTING = """
    image_modalities modality_routing modality_router_bias smar_eps smar_scope moe_aux_loss_coeff
""".split()
PARTS = {"vision": "vision_model.", "connector": "connector.", "language": "language_model."}
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one shape and data type whose names differ only in a number.

    Attributes:
        name: The weights' common name, with `*` for the number.
        count: Number of weights in the group.
        shape: Unsharded shape of each weight, with layers and experts stacked in front where Megatron stacks them.
        dtype: Data type of each weight.
        parameters: Number of elements of all weights together.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int


@dataclass(frozen=True)
class CheckpointDescription:
    """What one checkpoint holds.

    Attributes:
        folder: The checkpoint's folder.
        step: Optimizer steps made; None for a release, i.e. weights without a training's history.
        samples: Training samples consumed; packs with --packing-buffer-size.
        tokens_at_most: Upper bound of the tokens trained on (samples times --seq-length): padding is counted.
        frozen: Parts that were not trained, as --freeze names them; None where the run did not store it.
        architecture: Arguments that shape the model.
        family: Hugging Face's model type, where the checkpoint has a config.
        weights: Groups of weights.
        parameters: Number of parameters of each part, of all experts, of the routers, and in total.
        routing: Kinds of images, and the routing strategy's settings.
        placement: Where the experts were moved, as a phrase; empty where they have the numbers that they began with.
        layout: Parallel layout under which the checkpoint was saved.
        program: Releases of the software that saved the checkpoint; empty where the run did not store them.
        optimizer: Kind of the optimizer and form of its state; None without a state.
        optimizer_bytes: Size of the optimizer's state in bytes.
        data_states: Number of data-parallel ranks whose data loader's state was saved.
        size: Bytes on disk.
        files: Number of files.
        problems: What is missing; empty for a complete checkpoint.
    """

    folder: Path
    step: int | None
    samples: int
    tokens_at_most: int | None
    frozen: tuple[str, ...] | None
    architecture: dict[str, Any]
    family: str | None
    weights: tuple[WeightGroup, ...]
    parameters: dict[str, int]
    routing: dict[str, Any]
    placement: str
    layout: dict[str, Any]
    program: dict[str, str]
    optimizer: str | None
    optimizer_bytes: int
    data_states: int
    size: int
    files: int
    problems: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every file exists and has its full length."""
        return not self.problems

    @property
    def stage(self) -> str:
        """The training stage, as the frozen parts show it."""
        if self.frozen is None:
            return "not a training's"
        known = {("language", "vision"): "stage 1, visual alignment", ("vision",): "stage 2, visual instruction tuning"}
        name = known.get(tuple(sorted(self.frozen)))
        frozen = f"frozen: {', '.join(self.frozen) or 'nothing'}"
        return f"{name} ({frozen})" if name else frozen

    def as_json(self) -> dict[str, Any]:
        """Returns the description in JSON's types."""
        content = dataclasses.asdict(self) | {"is_whole": self.is_whole, "stage": self.stage}
        plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
        return plain

    def table(self) -> str:
        """Returns the description as text for a terminal."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rows = [
            ("checkpoint", self.folder),
            ("complete", "yes" if self.is_whole else "NO: " + "; ".join(self.problems)),
            ("size", f"{decimal_bytes(self.size)} in {self.files} files"),
            ("step", "none: a release, weights without a training's history" if self.step is None else self.step),
            ("samples", self.samples),
            ("tokens", "not known" if self.tokens_at_most is None else f"at most {self.tokens_at_most:,}"),
            ("stage", self.stage),
            ("data state", f"of {self.data_states} data-parallel ranks" if self.data_states else "none"),
            ("optimizer", f"{self.optimizer}, {decimal_bytes(self.optimizer_bytes)}" if self.optimizer else "none"),
            ("saved with", _joined(self.program) or "not known"),
            ("layout", _joined(self.layout) or "not known"),
            ("routing", _joined(self.routing) or "not known"),
            *([("placement", self.placement)] if self.placement else []),
            ("family", self.family or "not known: no hf/config.json next to it"),
            ("architecture", _joined(self.architecture) or "not known"),
            ("parameters", _joined({part: f"{number:,}" for part, number in self.parameters.items()})),
        ]
        yield from (f"{name:<13}{value}" for name, value in rows)
        yield ""
        width = max((len(group.name) for group in self.weights), default=0)
        yield f"{'weight':<{width}}  count  {'dtype':<9}{'parameters':>16}  shape"
        for group in self.weights:
            shape = " x ".join(map(str, group.shape)) or "scalar"
            yield f"{group.name:<{width}}  {group.count:>5}  {group.dtype:<9}{group.parameters:>16,}  {shape}"


def describe(path: Path, iteration: int | None = None) -> CheckpointDescription:
    """Describes one checkpoint from its table of contents and its run's arguments; reads no tensor.

    Args:
        path: The folder that --load takes, or the folder of one of its checkpoints.
        iteration: The checkpoint's step; None for the latest checkpoint.

    Raises:
        ValueError: There is no such checkpoint, or its format is not torch_dist, or it is damaged.
    """
    folder = find_checkpoint(path, iteration)
    contents = read_contents(folder)
    problems = tuple(file_problems(folder, contents))
    try:
        state = read_common_state(folder, contents)
    except DamagedError as error:
        raise DamagedError(f"{folder} is damaged: {'; '.join(problems)}.") if problems else error from error
    arguments = vars(saved_arguments(state))
    is_release = folder.name == "release"
    samples = int(arguments.get("consumed_train_samples") or 0)
    weights = tuple(_groups(contents))
    return CheckpointDescription(
        folder=folder,
        step=None if is_release else int(state["iteration"]),
        samples=samples,
        tokens_at_most=samples * arguments["seq_length"] if samples and arguments.get("seq_length") else None,
        frozen=None if is_release or "freeze" not in arguments else tuple(arguments["freeze"]),
        architecture=_named(arguments, ARCHITECTURE),
        family=_family(folder.parent / "hf" / "config.json"),
        weights=weights,
        parameters=_parameters(weights),
        routing=_named(arguments, [*ROUTING, *_strategy_flags(arguments)]),
        placement=describe_placement(saved_arguments(state)),
        layout=_named(arguments, LAYOUT),
        program=dict(arguments.get("program") or {}),
        optimizer=_optimizer(state, contents),
        optimizer_bytes=sum(p.length for i, p in contents.storage_data.items() if OPTIMIZER.match(i.fqn)),
        data_states=_data_states(folder, arguments.get("loader_state_folder")),
        size=sum(file.stat().st_size for file in _files(folder)),
        files=len(_files(folder)),
        problems=problems,
    )


def _groups(contents: Metadata) -> Iterator[WeightGroup]:
    """Yields the model's weights in the order of their names, grouped where names differ only in a number."""
    groups: dict[tuple[str, tuple[int, ...], str], int] = {}
    for key, data in contents.state_dict_metadata.items():
        if isinstance(data, TensorStorageMetadata) and not OPTIMIZER.match(key):
            kind = re.sub(r"\.\d+\.", ".*.", key), tuple(data.size), str(data.properties.dtype).removeprefix("torch.")
            groups[kind] = groups.get(kind, 0) + 1
    for (name, shape, dtype), count in sorted(groups.items()):
        yield WeightGroup(name, count, shape, dtype, count * math.prod(shape))


def _parameters(weights: Iterable[WeightGroup]) -> dict[str, int]:
    groups = list(weights)
    count = {part: sum(g.parameters for g in groups if g.name.startswith(prefix)) for part, prefix in PARTS.items()}
    count["experts"] = sum(g.parameters for g in groups if ".mlp.experts." in g.name)
    count["routers"] = sum(g.parameters for g in groups if ".mlp.router." in g.name)
    return count | {"altogether": sum(g.parameters for g in groups)}


def _optimizer(state: dict[str, Any], contents: Metadata) -> str | None:
    """Returns the kind of the optimizer and the form of its state; None without a state."""
    if not any(OPTIMIZER.match(key) for key in contents.state_dict_metadata):
        return None
    kind = getattr(saved_arguments(state), "optimizer", "not known")
    sharding = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if sharding is None:
        return f"{kind}, for any layout"
    reach = "any layout" if sharding == "fully_reshardable" else "any number of replicas"
    return f"{kind}, of the distributed optimizer ({sharding}: for {reach})"


def _data_states(folder: Path, elsewhere: str | None) -> int:
    """Counts the data-parallel ranks whose loader state exists, next to the checkpoint or in the run's own folder."""
    for states in (folder.parent / "dataloader", *([Path(elsewhere)] if elsewhere else [])):
        found = {file.name for file in (states / folder.name).glob("*/train_dataloader_dprank*.pt")}
        if found:
            return len(found)
    return 0


def _family(config: Path) -> str | None:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        parts = [content, content.get("text_config", {}), content.get("vision_config", {})]
        return " with ".join(part["model_type"] for part in parts if "model_type" in part) or None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _strategy_flags(arguments: dict[str, Any]) -> list[str]:
    strategy = STRATEGIES.get(arguments.get("modality_routing", "none"))
    return [f"{strategy.name}_{field.name}" for field in strategy.flag_fields()] if strategy else []


def _named(arguments: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def decimal_bytes(number: float) -> str:
    """Returns a size as text, in the unit that leaves one to three digits before the decimal point."""
    size, units = float(number), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, _ = size / 1000, units.pop(0)
    return f"{size:.3g} {units[0]}"
