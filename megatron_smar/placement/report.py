# SPDX-License-Identifier: Apache-2.0
"""The report of a placement: crossing, devices per token and bytes, before and after, by chance and at the least."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_smar.checkpoint.expert_order import Orders
from megatron_smar.placement.dispatch import Assignments, Traffic, leaving
from megatron_smar.placement.expectation import Sizes

BEFORE, AFTER, ALL = "before", "after", "all"


@dataclass(frozen=True)
class Dispatched:
    """What was dispatched for the samples of a report.

    Attributes:
        modalities: Names of the M modalities, by id.
        num_experts: E, the number of experts.
        top_k: K, experts per token.
        bytes_per_copy: Size of one token's hidden state.
        traffic: By assignment (`assignments`) and layer.
    """

    modalities: tuple[str, ...]
    num_experts: int
    top_k: int
    bytes_per_copy: int
    traffic: Mapping[str, Mapping[int, Traffic]]


def device_counts(num_experts: int, wanted: Sequence[int]) -> list[int]:
    """Returns the numbers of devices that share the experts equally.

    Raises:
        ValueError: None of them does.
    """
    fitting = [devices for devices in wanted if devices > 1 and num_experts % devices == 0]
    if not fitting:
        raise ValueError(
            f"--devices {' '.join(map(str, wanted))}: none of these shares the model's {num_experts} experts equally; "
            f"give numbers that divide {num_experts}."
        )
    return fitting


def assignments(before: Orders, after: Orders, devices: Sequence[int]) -> Assignments:
    """Returns each expert's device by name (`before 2`, `after 2`, ...) and layer.

    Args:
        before: The expert at place 0, 1, ... of each layer, before the placement.
        after: The same after the placement.
        devices: Numbers of devices; each device has a run of places.
    """
    return {
        f"{name} {number}": {layer: device_of(order, number) for layer, order in orders.items()}
        for name, orders in ((BEFORE, before), (AFTER, after))
        for number in devices
    }


def device_of(order: Sequence[int], devices: int) -> list[int]:
    """Returns the device of each expert: place p of E is on device p // (E / devices)."""
    size = len(order) // devices
    found = [0] * len(order)
    for place, expert in enumerate(order):
        found[expert] = place // size
    return found


def report(found: Dispatched) -> dict[str, Any]:
    """Returns all numbers, averaged over the layers and for each layer, as JSON's types."""
    layers = {name: dict(sums) for name, sums in found.traffic.items()}
    first = next(iter(next(iter(layers.values())).values()))
    tokens = dict(zip([*found.modalities, "padding"], map(int, first.tokens), strict=True))
    numbers = list(dict.fromkeys(int(name.split()[1]) for name in layers))
    return {
        "experts": found.num_experts,
        "experts_per_token": found.top_k,
        "bytes_per_copy": found.bytes_per_copy,
        "tokens": tokens,
        "devices": {str(number): _of_devices(found, number) for number in numbers},
    }


def _of_devices(found: Dispatched, devices: int) -> dict[str, Any]:
    sizes = Sizes(found.num_experts, found.top_k, devices)
    size = found.bytes_per_copy
    by_layer = {
        layer: {when: _by_scope(found, found.traffic[f"{when} {devices}"][layer]) for when in (BEFORE, AFTER)}
        for layer in found.traffic[f"{BEFORE} {devices}"]
    }
    content: dict[str, Any] = {
        "chance": {
            "crossing": sizes.chance_crossing,
            "devices_per_token": sizes.chance_devices,
            "bytes_all_to_all": found.top_k * sizes.away * size,
            "bytes_per_device": sizes.chance_devices * sizes.away * size,
        },
        "floor": {
            "crossing": sizes.least_crossing,
            "devices_per_token": sizes.least_devices,
            "bytes_all_to_all": found.top_k * sizes.away * size,
            "bytes_per_device": sizes.least_devices * sizes.away * size,
        },
    }
    scopes = list(next(iter(by_layer.values()))[BEFORE])
    for when in (BEFORE, AFTER):
        content[when] = {scope: _mean([layer[when][scope] for layer in by_layer.values()]) for scope in scopes}
    content["cut_reached"] = {
        scope: sizes.cut(*(content[when][scope]["devices_per_token"] for when in (BEFORE, AFTER))) for scope in scopes
    }
    content["layers"] = {str(layer): values for layer, values in by_layer.items()}
    return content


def _by_scope(found: Dispatched, traffic: Traffic) -> dict[str, dict[str, float]]:
    """Returns one layer's numbers for each modality that has tokens, and for all together; bytes are per token."""
    scopes = {name: [number] for number, name in enumerate(found.modalities) if traffic.tokens[number] > 0}
    scopes[ALL] = list(range(len(found.modalities)))
    values = {}
    for scope, classes in scopes.items():
        part = traffic.merged(classes)
        values[scope] = {
            "crossing": float(part.crossing),
            "devices_per_token": float(part.devices),
            "bytes_all_to_all": float(leaving(part.copies) / part.tokens) * found.bytes_per_copy,
            "bytes_per_device": float(leaving(part.single) / part.tokens) * found.bytes_per_copy,
        }
    return values


def headline(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report's main numbers for its first number of devices, flat.

    `bytes_cut_of_reachable` is the cut in bytes that leave a device, of a dispatch with one copy per device, as a share
    of the cut that no placement can exceed; None if nothing can be cut.
    """
    devices, values = next(iter(content["devices"].items()))
    found: dict[str, Any] = {"devices": int(devices)}
    for when in (BEFORE, AFTER):
        for scope, numbers in values[when].items():
            suffix = "" if scope == ALL else f"_{scope}"
            found[f"crossing_{when}{suffix}"] = numbers["crossing"]
    return found | {"bytes_cut_of_reachable": values["cut_reached"][ALL]}


def _mean(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(layer[name] for layer in layers) for name in layers[0]}


def table(content: Mapping[str, Any]) -> str:
    """Returns the report as text for a terminal: averages over the layers, bytes per token and layer."""
    heads = ("crossing", 21), ("devices/token", 17), ("all-to-all, B", 17), ("per device, B", 17), ("cut reached", 13)
    columns = " " * 19 + "".join(f"{head:>{width}}" for head, width in heads)
    lines = [
        f"{content['experts']} experts, {content['experts_per_token']} per token; tokens: "
        + ", ".join(f"{number:,} {name}" for name, number in content["tokens"].items()),
        "before -> after; bytes that leave a token's device, per token and layer; means over the layers",
    ]
    for devices, values in content["devices"].items():
        lines += ["", f"{devices} devices", columns]
        for scope in values[BEFORE]:
            before, after, cut = values[BEFORE][scope], values[AFTER][scope], values["cut_reached"][scope]
            lines.append(
                f"{'':<9}{scope:<10}"
                + f"{before['crossing']:>11.1%} -> {after['crossing']:>6.1%}"
                + _pair(before, after, "devices_per_token", 2)
                + _pair(before, after, "bytes_all_to_all", 0)
                + _pair(before, after, "bytes_per_device", 0)
                + (f"{cut:>13.1%}" if cut is not None else f"{'-':>13}")
            )
        for name in ("chance", "floor"):
            row = values[name]
            lines.append(
                f"{'':<9}{name:<10}{row['crossing']:>21.1%}{row['devices_per_token']:>17.2f}"
                f"{row['bytes_all_to_all']:>17.0f}{row['bytes_per_device']:>17.0f}"
            )
    return "\n".join(lines)


def _pair(before: Mapping[str, float], after: Mapping[str, float], name: str, digits: int) -> str:
    return f"{f'{before[name]:.{digits}f} -> {after[name]:.{digits}f}':>17}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the report's numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
