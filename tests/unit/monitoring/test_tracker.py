# SPDX-License-Identifier: Apache-2.0
"""The logged metrics of the experts' load, when they are reduced, and the collapse warning."""

import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from megatron_smar.monitoring.load_map import LEFT, TOP
from megatron_smar.routing import RoutingStatistics
from tests.launch import on_two_ranks

# Counts [M][E] of two layers, 8 tokens each, top-2: text and vision share no expert in the first, all in the second.
APART = [[8, 8, 0, 0], [0, 0, 8, 8]]
ALIKE = [[6, 4, 4, 2], [6, 4, 4, 2]]


class Writer(dict):
    """Records what is written to TensorBoard, and to W&B with `log` and `Image`."""

    Image = staticmethod(lambda image: image)

    def add_scalar(self, name, value, iteration):
        self[name] = value

    def add_image(self, name, image, iteration, dataformats):
        assert dataformats == "HWC" and image.dtype == np.uint8
        self[name] = image

    def log(self, values, iteration):
        self.update(values)


def tracker_of(**config):
    from megatron_smar.monitoring.config import MonitorConfig
    from megatron_smar.monitoring.tracker import RoutingMetricsTracker

    return RoutingMetricsTracker(MonitorConfig(**({"num_experts": 4, "top_k": 2, "collapse_tokens": 64} | config)))


def statistics(counts, top_k=2) -> RoutingStatistics:
    counts = torch.tensor(counts, dtype=torch.float32)
    return RoutingStatistics(counts, counts / top_k, counts.sum(dim=1) / top_k)


def observe(tracker, found: RoutingStatistics, layer: int, layers: int, distance: float | None = None) -> None:
    """Reports one layer's micro-batch to the tracker; without a distance, the modalities are not comparable."""
    from megatron_smar.routing.router import MRD_DISTANCE, RoutingReport
    from megatron_smar.routing.strategies.base import Weighted

    weighted = Weighted(torch.tensor(float(distance or 0)), torch.tensor(float(distance is not None)))
    losses = {metric.name: torch.tensor(1.0) for metric in tracker.config.metrics}
    tracker.observe(RoutingReport(layer, layers, found, losses, {MRD_DISTANCE: weighted}))


def record(tracker, *layers) -> None:
    for number, counts in enumerate(layers, start=1):
        observe(tracker, statistics(counts), number, len(layers))


def report(tracker, iteration, writer=None, wandb=None, layers=2) -> str:
    return tracker.report(1.0, iteration, writer, wandb, num_layers=layers, track_names=[])


def test_scalars_of_both_layers_reach_tensorboard_and_wandb(single_rank):
    tracker, board, wandb = tracker_of(), Writer(), Writer()
    record(tracker, APART, ALIKE)
    line = report(tracker, 1, board, wandb)
    apart, even = math.log(2), math.log(4)
    alike = -sum(share * math.log(share) for share in (6 / 16, 4 / 16, 4 / 16, 2 / 16))
    expected = {
        "moe/msi_layer_1": 1.0,
        "moe/msi_layer_2": 0.0,
        "msi": 0.5,
        "moe/load_entropy_layer_1/text": apart,
        "moe/load_entropy_layer_1/vision": apart,
        "moe/load_entropy_layer_2/text": alike,
        "moe/load_entropy_layer_2/vision": alike,
        "moe/load_entropy_share/text": (apart + alike) / even / 2,
        "moe/load_entropy_share/vision": (apart + alike) / even / 2,
        "moe/max_load_layer_1/text": 0.5,
        "moe/max_load_layer_1/vision": 0.5,
        "moe/max_load_layer_2/text": 6 / 16,
        "moe/max_load_layer_2/vision": 6 / 16,
        "moe/token_share/text": 0.5,
        "moe/token_share/vision": 0.5,
    }
    for writer in (board, wandb):
        scalars = {name: v for name, v in writer.items() if name != "smar loss" and not name.startswith("moe/load/")}
        assert scalars == pytest.approx(expected)
    assert line.endswith(" msi: 0.500 |")


def test_images_show_the_share_of_tokens_that_choose_each_expert(single_rank):
    tracker, board, wandb = tracker_of(), Writer(), Writer()
    record(tracker, APART, ALIKE)
    report(tracker, 1, board, wandb)
    shares = np.array([[8, 8, 0, 0], [6, 4, 4, 2]]) / 8
    image = board["moe/load/text"]
    high = wide = 40  # pixels of a cell
    for layer, expert in np.ndindex(2, 4):
        cell = image[TOP + layer * high : TOP + (layer + 1) * high, LEFT + expert * wide : LEFT + (expert + 1) * wide]
        colour = 255 * np.array(colormaps["viridis"](math.sqrt(shares[layer, expert]))[:3])
        assert abs(cell - colour).max() <= 4, (layer, expert)
    assert (wandb["moe/load/vision"] == board["moe/load/vision"]).all()
    assert (board["moe/load/vision"] != image).any()


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 4), (32, 8), (61, 256), (94, 128)])
def test_heat_maps_have_the_numbers_of_layers_and_experts_at_their_cells_and_a_scale(layers, experts):
    from megatron_smar.monitoring.load_map import LoadMap

    shares = np.zeros((layers, experts))
    shares[-1, -1] = 1.0
    heat_map = LoadMap(layers, experts, "vision tokens by expert")
    axes, scale = heat_map.figure.axes
    assert axes.get_title("left") == "vision tokens by expert"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert (from 0)", "layer (from 1)")
    assert scale.get_ylabel() == "share of tokens"
    assert {label.get_text() for label in scale.get_yticklabels()} >= {"0%", "1%", "10%", "50%", "100%"}
    picture = heat_map.draw(shares)
    yellow = 255 * np.array(colormaps["viridis"](1.0)[:3])
    height = picture.shape[0]
    for number, size, axis, place in (
        (layers, heat_map.cell[0], 1, axes.yaxis),
        (experts, heat_map.cell[1], 0, axes.xaxis),
    ):
        ticks = [tick for tick in place.get_majorticklocs() if axis <= tick <= number - 1 + axis]
        assert ticks and all(tick == int(tick) for tick in ticks)
        point = (0, number) if axis else (number - 1, 1)
        at = axes.transData.transform(point)[axis]
        first = (TOP if axis else LEFT) + (number - 1) * size
        assert first <= (height - at if axis else at) <= first + size, "a label is at the cell that it names"
    rows, columns = TOP + layers * heat_map.cell[0], LEFT + experts * heat_map.cell[1]
    last = picture[rows - heat_map.cell[0] : rows, columns - heat_map.cell[1] : columns]
    assert abs(last - yellow).max() <= 1
    assert (heat_map.draw(shares) == picture).all(), "drawing changes the map's state"


def test_real_tensorboard_takes_scalars_and_images(single_rank, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker = tracker_of()
    record(tracker, APART, ALIKE)
    with SummaryWriter(tmp_path) as writer:
        report(tracker, 1, writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("moe/msi_layer_1")[0].value == 1
    image = events.Images("moe/load/vision")[0]
    assert image.height > 2 * 40 and image.width > 4 * 40, "the image has only the cells"


def test_intervals_cover_all_steps_since_the_last_and_nothing_is_reduced_between_them(single_rank, monkeypatch):
    """Scalars every 2 steps and lines every 4: each covers the steps since its last, weighted by tokens, none twice."""
    from megatron_smar.monitoring.tracker import WINDOW, RoutingMetricsTracker

    reduced = []
    sync = RoutingMetricsTracker._sync_metrics
    spy = lambda self, names, groups=None: (reduced.extend(names), sync(self, names, groups))  # noqa: E731
    monkeypatch.setattr(RoutingMetricsTracker, "_sync_metrics", spy)
    tracker, written, lines = tracker_of(scalar_interval=2, console_interval=4), [], []
    for step in range(1, 9):
        record(tracker, APART if step <= 4 else ALIKE)
        if step == 1:
            record(tracker, ALIKE)  # a second micro-batch of the same size
        writer = Writer()
        lines.append("msi: " in report(tracker, step, writer, layers=1))
        written.append(writer.get("msi"))
        tracker.clear()  # as Megatron does after every step and after evaluation
    assert lines == [True, False, False, True, False, False, False, True], "Megatron also prints after step 1"
    # Steps 1 and 2: two of three micro-batches are APART; halves of the sums: text 22:20:4:2, vision 6:4:20:18 of 48.
    assert written == [None, pytest.approx(2 / 3), None, 1, None, 0, None, 0]
    assert reduced.count(WINDOW) == 5, "once after step 1, then every two steps"


def test_console_covers_the_whole_interval(single_rank):
    tracker = tracker_of(scalar_interval=1, console_interval=3)
    for step, counts in enumerate((APART, ALIKE, ALIKE), start=1):
        record(tracker, counts)
        line = report(tracker, step, layers=1)
    assert line.endswith(" msi: 0.333 |")


def test_distances_are_means_over_the_micro_batches_since_the_last_point_and_line(single_rank):
    """Points every 2 steps, lines every 4; steps 3 and 6 have no distance, step 7 has two micro-batches."""
    from megatron_smar.routing.strategies import STRATEGIES

    metrics = STRATEGIES["smar"].metrics
    tracker, written, lines = tracker_of(scalar_interval=2, console_interval=4, metrics=metrics), [], []
    for step, distances in enumerate(([1], [2], [], [4], [5], [], [6, 10], [9]), start=1):
        for distance in distances:
            observe(tracker, statistics(ALIKE), 2, 2, distance)
        writer = Writer()
        found = re.search(r"mrd distance: ([\d.]+) \|", report(tracker, step, writer))
        lines.append(float(found[1]) if found else None)
        written.append(writer.get("moe/mrd_distance_layer_2"))
        assert writer.get("mrd distance") == written[-1] and "moe/mrd_distance_layer_1" not in writer
        assert ("smar loss" in writer) == (step % 2 == 0), "written between two points"
        tracker.clear()
    assert written == [None, 1.5, None, 4, None, 5, None, 25 / 3]
    assert lines == [1, None, None, 2.3333, None, None, None, 7.5]


def test_layers_without_tokens_of_two_modalities_have_no_index(single_rank):
    tracker, writer = tracker_of(), Writer()
    observe(tracker, statistics([[8, 8, 0, 0], [0, 0, 0, 0]]), 1, 2)
    assert "msi" not in report(tracker, 1, writer, layers=2)
    assert not [name for name in writer if "msi" in name or "vision" in name or "layer_2" in name]
    assert writer["moe/token_share/text"] == 1


def test_third_modality_has_a_name_and_a_stage_without_moe_layers_reports_nothing(single_rank):
    tracker, writer = tracker_of(modalities=("text", "vision", "chart")), Writer()
    assert "msi" not in report(tracker, 1, writer)
    observe(tracker, statistics([[4, 4, 0, 0], [0, 0, 4, 4], [0, 0, 8, 8]]), 1, 2)
    report(tracker, 2, writer, layers=2)
    assert writer["moe/token_share/chart"] == 0.5


def test_dropped_slots_are_logged_where_capacity_is_limited(single_rank):
    for limited in (False, True):
        tracker, writer = tracker_of(capacity_limited=limited), Writer()
        executed = RoutingStatistics(torch.tensor([[4.0, 4, 0, 0], [2, 1, 0, 0]]), torch.ones(2, 4), torch.ones(2) * 4)
        observe(tracker, executed, 1, 1)
        report(tracker, 1, writer, layers=1)
        dropped = {name: value for name, value in writer.items() if "dropped" in name}
        assert dropped == ({"moe/dropped_layer_1/text": 0, "moe/dropped_layer_1/vision": 5 / 8} if limited else {})


def test_counting_does_not_touch_the_graph_and_stays_exact_over_millions_of_tokens(single_rank):
    tracker, writer = tracker_of(), Writer()
    counts = torch.full((2, 4), 2.0**24, requires_grad=True)
    for extra in (0.0, 1.0, 1.0):  # float32 would lose the ones
        added = counts if not extra else torch.full((2, 4), extra)
        observe(tracker, RoutingStatistics(added, added, added.sum(dim=1) / 2), 1, 1)
    assert tracker._window[0, 0, 0] == 2**24 + 2
    assert not tracker._window.requires_grad
    report(tracker, 1, writer, layers=1)
    assert writer["msi"] == 0


def test_collapse_is_reported_once_and_again_only_after_recovery(single_rank, capsys):
    collapsed = [[40, 40, 40, 40], [79, 1, 40, 40]]  # 79 of 80 vision tokens choose expert 0
    absent = [[40, 40, 40, 40], [0, 0, 0, 0]]
    tracker = tracker_of(console_interval=2)
    warned = []
    for step, counts in enumerate([ALIKE, collapsed, *[collapsed] * 4, absent, absent, *[collapsed] * 2], start=1):
        record(tracker, ALIKE, counts)
        report(tracker, step)
        warned.append("WARNING" in capsys.readouterr().out)
    # Over steps 1 and 2 it is 85 of 88 tokens.
    assert warned == [False, True] + [False] * 8, "one warning while it lasts; an interval without vision is skipped"
    healthy = [[60, 40, 40, 20], [60, 40, 40, 20]]
    for step, counts in enumerate([healthy, healthy, collapsed, collapsed], start=11):
        record(tracker, ALIKE, counts)
        report(tracker, step)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "WARNING: iteration 14: routing collapses: 98.8% of the vision tokens choose expert 0 of layer 2 ("
    )
    assert "--moe-collapse-threshold 0.9)" in line


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ({"collapse_threshold": 1.0}, [[64, 64, 0, 0], [64, 0, 64, 0]]),
        ({"top_k": 4}, [[64, 64, 64, 64], [64, 64, 64, 64]]),
        ({"top_k": 3, "collapse_threshold": 0.8}, [[64, 64, 64, 0], [64, 64, 64, 0]]),
        ({"router_learns": False}, [[64, 64, 0, 0], [64, 0, 64, 0]]),
        ({"collapse_tokens": 65}, [[64, 64, 0, 0], [64, 0, 64, 0]]),
        ({"collapse_tokens": 1}, [[64, 64, 64, 64], [63, 63, 0, 0]]),
        ({}, [[64, 64, 64, 64], [90, 10, 50, 50]]),
    ],
    ids=[
        "switched off",
        "every expert is always chosen",
        "three of four experts are chosen, so that even load is near the threshold",
        "the router is frozen",
        "fewer tokens than collapse_tokens",
        "fewer tokens than 16 per expert",
        "below the threshold",
    ],
)
def test_no_collapse_is_reported(single_rank, capsys, config, counts):
    tracker = tracker_of(**config)
    observe(tracker, statistics(counts, config.get("top_k", 2)), 1, 1)
    report(tracker, 1, layers=1)
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("strategy", "advised", "not_advised"),
    [
        ("smar", "--smar-d-min and --smar-d-max, or balance with --moe-aux-loss-coeff.", "--ernie"),
        ("none", "balance with --moe-aux-loss-coeff.", "--smar"),
        ("ernie", "--ernie-balance-coeff or --ernie-bias-rate.", "--moe-aux-loss-coeff"),
    ],
)
def test_the_collapse_warning_does_not_advise_the_strategys_own_flags(
    single_rank, capsys, strategy, advised, not_advised
):
    from megatron_smar.routing.strategies import STRATEGIES

    tracker = tracker_of(collapse_remedy=STRATEGIES[strategy].collapse_remedy)
    record(tracker, [[64, 64, 0, 0], [64, 0, 64, 0]])
    report(tracker, 1, layers=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(advised) and not_advised not in line


def test_many_collapses_are_one_line(single_rank, capsys):
    tracker = tracker_of()
    record(tracker, *[[[64, 64, 0, 0], [64, 0, 64, 0]]] * 5)
    report(tracker, 1, layers=5)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count("tokens choose expert") == 8 and ", and 12 more (" in line


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1, math.nan])
def test_a_threshold_that_is_not_a_share_is_refused(threshold):
    from megatron_smar.monitoring.config import MonitorConfig

    with pytest.raises(ValueError, match=rf"--moe-collapse-threshold is {re.escape(str(threshold))}"):
        MonitorConfig(collapse_threshold=threshold)


def test_config_comes_from_the_flags():
    from megatron_smar.monitoring.config import MonitorConfig
    from megatron_smar.routing.strategies import STRATEGIES

    flags = {
        "tensorboard_dir": None,
        "wandb_project": "",
        "num_experts": 8,
        "moe_router_topk": 2,
        "smar_scope": "local",
        "tensorboard_log_interval": 5,
        "log_interval": 10,
        "moe_expert_capacity_factor": 1.5,
        "moe_collapse_threshold": 0.8,
        "freeze": ["vision", "language"],
        "image_modalities": ["vision", "chart"],
        "modality_routing": "smar",
    }
    config = MonitorConfig.from_arguments(SimpleNamespace(**flags))
    smar = STRATEGIES["smar"]
    assert config == MonitorConfig(
        8, 2, ("text", "vision", "chart"), "local", 10, 10, True, 0.8, 1024, False, smar.collapse_remedy, smar.metrics
    ), "without a writer nothing is reduced between lines"
    assert MonitorConfig.from_arguments(SimpleNamespace(**flags | {"tensorboard_dir": "x"})).scalar_interval == 5
    stage_2 = MonitorConfig.from_arguments(
        SimpleNamespace(**flags | {"freeze": ["vision"], "modality_routing": "none"})
    )
    remedy = STRATEGIES["none"].collapse_remedy
    assert (stage_2.router_learns, stage_2.collapse_remedy, stage_2.metrics) == (True, remedy, smar.metrics)


def test_the_routers_of_a_model_report_to_the_tracker_only_in_training(single_rank, tmp_path):
    from tests.models import build_hf_model, build_model, prepare

    build_hf_model(image_token_id=5).model.vision_tower.save_pretrained(tmp_path)
    model = build_model(str(tmp_path), recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    ids = torch.full((2, 12), 7)
    ids[0, 2:6] = 5
    padding = torch.zeros_like(ids, dtype=torch.bool)
    padding[1, 9:] = True
    batch = prepare(ids, padding, torch.randn(1, 3, 32, 32), 5)
    tracker, writer = tracker_of(), Writer()
    tracker.watch([model])
    with torch.no_grad():
        model.eval()(**batch)
    assert tracker._window is None
    for _ in range(2):
        model.train()(**batch, labels=ids).mean().backward()
    assert tracker._window[:, :, -1].tolist() == [[2 * 17, 2 * 4]] * 3, "recomputation counts once, padding never"
    assert (tracker._window[:, :, :-1].sum(dim=2) == 2 * tracker._window[:, :, -1]).all()
    report(tracker, 1, writer, layers=3)
    assert all(0 <= writer[f"moe/msi_layer_{layer}"] <= 1 for layer in (1, 2, 3))


def _report_on_a_rank(rank: int, store: str, results) -> None:
    """Runs one of two ranks. `pp`: layers 1 and 2 on separate stages; `dp`: replicas with different tokens."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", OMP_NUM_THREADS="1")
    from megatron_smar import runtime

    runtime.install()
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for layout, scope in (("pp", "global"), ("dp", "local")):
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2 if layout == "pp" else 1)
        tracker, writer = tracker_of(scope=scope, console_interval=1), Writer()
        if layout == "pp":
            observe(tracker, statistics((APART, ALIKE)[rank]), rank + 1, 3)  # layer 3 is dense
        else:
            observe(tracker, statistics(([[8, 8, 0, 0], [0, 0, 0, 0]], [[8, 8, 0, 0], [8, 8, 8, 8]])[rank]), 1, 3)
        report(tracker, 1, writer, layers=3)
        observe(tracker, statistics(ALIKE), rank + 1 if layout == "pp" else 1, 3)
        report(tracker, 2, again := Writer(), layers=3)
        results[f"{layout} {rank}"] = ({k: v for k, v in writer.items() if "/load/" not in k}, again["msi"])
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.slow
def test_sums_of_stages_and_replicas_are_combined_on_every_rank(tmp_path):
    results = on_two_ranks(_report_on_a_rank, tmp_path)
    for rank in (0, 1):
        stages, again = results[f"pp {rank}"]
        assert (stages["moe/msi_layer_1"], stages["moe/msi_layer_2"], again) == (1, 0, 0)
        assert "moe/msi_layer_3" not in stages
        replicas, _ = results[f"dp {rank}"]
        assert replicas["moe/msi_layer_1"] == pytest.approx(0.5), "text 1/2 1/2 0 0, vision even"
        assert replicas["moe/token_share/vision"] == pytest.approx(16 / 32)
