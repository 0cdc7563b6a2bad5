# SPDX-License-Identifier: Apache-2.0
"""Batch, loss, frozen parts and routing metrics, on one rank with a real model."""

from dataclasses import dataclass

import pytest
import torch

from tests.models import build_hf_model, build_model, prepare, smar_of_layer

IMAGE, SIDE, TOKENS = 5, 32, 4


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vision")
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder)
    return str(folder)


def inputs(images: int = 2, length: int = 24) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 128, (2, length), generator=generator)
    for image in range(images):
        ids[0, 6 * image : 6 * image + TOKENS] = IMAGE
    padding = torch.zeros_like(ids, dtype=torch.bool)
    padding[1, 16:] = True
    return prepare(ids, padding, torch.randn(images, 3, SIDE, SIDE, generator=generator), IMAGE)


def loss_of(model, batch: dict) -> torch.Tensor:
    labels = torch.full_like(batch["input_ids"], 9)
    return model(**batch, labels=labels)[:, :16].mean()


def test_a_batch_has_the_modalities_and_the_positions_of_the_features(single_rank):
    batch = inputs()
    assert batch["modality_ids"][0, :12].tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    assert batch["modality_ids"][1].tolist() == [0] * 16 + [-1] * 8
    assert batch["vision_index"][0, :12].tolist() == [0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1]


def test_placeholders_without_a_tile_are_refused(single_rank):
    ids = torch.full((1, 8), IMAGE)
    with pytest.raises(ValueError, match="8 image placeholder tokens but its 1 tiles give 4"):
        prepare(ids, torch.zeros_like(ids, dtype=torch.bool), torch.randn(1, 3, SIDE, SIDE), IMAGE)


def pack_of(lengths: list[int], ids: torch.Tensor, images: int = 0) -> dict:
    """Returns the model's inputs for one row of sequences of these lengths, the last of which is padding."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.data.batch import VisionLanguageBatch
    from megatron_smar.training.batch import prepare_batch

    padding = torch.arange(ids.shape[1])[None] >= sum(lengths[:-1])
    batch = VisionLanguageBatch(
        __key__=[str(i) for i in range(len(lengths) - 1)],
        __restore_key__=(),
        input_ids=ids,
        labels=ids,
        loss_mask=(~padding).float(),
        padding_mask=padding,
        pixel_values=torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)),
        lengths=torch.tensor(lengths),
        num_text_only=len(lengths) - 1 - images,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return vars(prepare_batch(batch, [IMAGE], TOKENS, True, groups, data_wait=(0.5, 2.0)))


def test_positions_start_from_0_in_each_sequence_of_a_pack(single_rank):
    batch = pack_of([3, 5, 4], torch.full((1, 12), 9))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    packed = batch["packed_seq_params"]
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 8, 12]
    assert packed.cu_seqlens_q.dtype == torch.int32 and packed.qkv_format == "thd"
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 5


def test_shares_of_a_micro_batch_are_logged_as_parts_and_totals(single_rank):
    shares = pack_of([3, 5, 4], torch.full((1, 12), 9))["shares"]
    assert {name: share.tolist() for name, share in shares.items()} == {
        "text-only ratio": [2, 2],
        "fill": [8, 12],
        "data wait": [0.5, 2.0],
    }


def test_samples_of_a_pack_do_not_see_each_other(single_rank, vision):
    torch.manual_seed(4)
    model = build_model(vision).eval()
    ids = torch.randint(6, 128, (1, 30))
    ids[0, 2 : 2 + TOKENS] = IMAGE

    def logits(ids: torch.Tensor) -> torch.Tensor:
        batch = pack_of([12, 11, 7], ids, images=1)
        names = ("input_ids", "position_ids", "modality_ids", "vision_index", "pixel_values", "packed_seq_params")
        return model(**{name: batch[name] for name in names})[0]

    other = ids.clone()
    other[0, :12] = torch.where(ids[0, :12] == IMAGE, IMAGE, 7)
    before, after = logits(ids), logits(other)
    assert torch.equal(before[12:23], after[12:23])
    assert not torch.allclose(before[6:12], after[6:12])


def test_all_copies_to_the_device_are_from_pinned_memory(single_rank, monkeypatch):
    """A copy from other memory is synchronous even with `non_blocking`."""
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_contiguous(), "pin_memory keeps the strides, and cannot fill an expanded tensor"
        pinned.append(tensor.data_ptr())
        return tensor

    def move(tensor: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking and (tensor.data_ptr() in pinned or not tensor.numel())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "cuda", move)
    batch = pack_of([3, 5, 4], torch.full((1, 12), 9))
    moved = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    assert {tensor.data_ptr() for tensor in moved if tensor.numel()} < set(pinned)


def test_text_positions_share_no_row_of_the_features_with_each_other():
    """These rows are read and discarded, but their zero gradients are summed: on CUDA one after another in each row."""
    from megatron_smar.model.vlm import _spread

    index = torch.full((3, 40), -1)
    index[1, 5:13] = torch.arange(8)
    rows = _spread(index, 16)
    assert torch.equal(rows[1, 5:13], index[1, 5:13])
    assert rows.min() >= 0 and rows.flatten().bincount(minlength=16).max() <= -(-120 // 16) + 1
    features = torch.randn(16, 4, requires_grad=True)
    torch.where((index >= 0).unsqueeze(-1), features[rows], 0.0).sum().backward()
    assert torch.equal(features.grad[:8], torch.ones(8, 4)) and torch.equal(features.grad[8:], torch.zeros(8, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_with_a_loss_that_is_not_finite_is_rerun(single_rank, value):
    from megatron.core import rerun_state_machine

    from megatron_smar.training.loss import lm_loss

    rerun_state_machine.initialize_rerun_state_machine(mode=rerun_state_machine.RerunMode.VALIDATE_RESULTS)
    try:
        machine = rerun_state_machine.get_rerun_state_machine()
        machine.state, machine.first_iteration_complete = rerun_state_machine.RerunState.INITIAL_RUN, True
        losses, mask = torch.tensor([[1.0, value]]), torch.ones(1, 2)
        for checked, given, again in ((True, torch.ones(1, 2), False), (False, losses, False), (True, losses, True)):
            lm_loss(mask, {}, checked, given)
            assert machine.rerun_requested is again
    finally:
        rerun_state_machine.destroy_rerun_state_machine()


def test_warm_up_rises_linearly_after_the_start_step():
    from megatron_smar.routing.strategies.smar import SmarConfig

    routing = SmarConfig(start_iter=3, warmup_iters=4)
    assert [routing.share(step) for step in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [SmarConfig(start_iter=2).share(step) for step in range(4)] == [0, 0, 1, 1]
    assert SmarConfig().share(0) == 1
    assert [SmarConfig(start_iter=1, end_iter=3).share(step) for step in range(5)] == [0, 1, 1, 0, 0]


def test_counted_steps_keep_the_order_and_know_a_steps_tokens_before_its_first_batch(single_rank):
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator as calculator

    from megatron_smar.training.batch import CountedSteps

    @dataclass
    class Batch:
        loss_mask: torch.Tensor
        step_tokens: torch.Tensor | None = None

    calculator.init_num_microbatches_calculator(0, None, 3, 1, 1)
    try:
        batches = [Batch(torch.tensor([1.0] * tokens + [0.0])) for tokens in (1, 2, 6, 0, 0, 0)]
        reader = CountedSteps(iter(batches), dist.group.WORLD)
        for place, given in enumerate(batches):
            read = next(reader)
            assert read.loss_mask is given.loss_mask
            # 9 in 3 micro-batches; Megatron divides by 1 where there is no token
            assert float(read.step_tokens) == pytest.approx(3 if place < 3 else 1 / 3)
    finally:
        calculator.destroy_num_microbatches_calculator()


@pytest.mark.parametrize("freeze", [("vision", "language"), ("vision",), ("vision", "connector"), ()])
@pytest.mark.parametrize("images", [0, 2], ids=["text only", "with images"])
def test_frozen_parts_get_no_gradient_and_the_others_all_do(single_rank, vision, freeze, images):
    model = build_model(vision, routing={"strategy": "smar"}, freeze=frozenset(freeze)).train()
    loss_of(model, inputs(images)).backward()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0].removesuffix("_model")
        if part in freeze:
            assert not parameter.requires_grad
            assert parameter.grad is None, f"{name} is frozen"
        elif "mask_token" not in name:
            assert parameter.requires_grad
            assert parameter.grad is not None, f"{name} left the graph: its rank would skip a collective"
    if images and "connector" not in freeze:
        assert model.connector.linear_1.weight.grad.abs().max() > 0


def test_a_frozen_encoder_stays_in_evaluation_mode(single_rank, vision):
    model = build_model(vision).train()
    assert not model.vision_model.tower.training
    assert model.language_model.training


def test_smar_adds_beta_times_the_band_losses_of_all_layers_to_the_loss(single_rank, vision):
    """The gradient of a model with SMAR equals that of main + beta * sum of losses computed outside the model."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_smar.routing.strategies.smar import LayerSettings

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    band = {"eps": 1e-3, "d_min": 3.0, "d_max": 4.0}
    own = {2: (0.0, 0.01)}  # the second layer's band, which pulls its modalities together
    layers = {layer: LayerSettings(band) for layer, band in own.items()}
    model = build_model(vision, routing={"strategy": "smar", "coeff": 0.25, "layers": layers, **band}).train()
    plain = build_model(vision).train()
    plain.load_state_dict(model.state_dict())
    plain.language_model.requires_grad_(True)  # without SMAR the bias is frozen
    losses = []
    for layer in plain.language_model.decoder.layers:
        layer.mlp.router.observers.append(
            lambda report: losses.append(
                smar_of_layer(report.statistics, 2, 1e-3, *own.get(report.layer, (3.0, 4.0)))[1]
            )
        )
    main = loss_of(plain, inputs())
    loss_of(model, inputs()).backward()
    (main + 0.25 * sum(losses)).backward()
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert model.language_model.decoder.layers[0].mlp.router.modality_bias.bias.grad.abs().max() > 1e-4


def test_bias_is_float32_in_half_precision_without_weight_decay_and_ignores_padding(single_rank):
    from megatron_smar.routing.modality_bias import ModalityBias

    module = torch.nn.ModuleDict({"modality_bias": ModalityBias(2, 4, trainable=True, sequence_parallel=True)})
    module["modality_bias"].bias.data.fill_(0.1)
    module.bfloat16()
    (name, bias), *_ = module.named_parameters()
    assert bias.dtype == torch.float32
    assert torch.equal(bias.data, torch.full((2, 4), 0.1)), "it was rounded to bfloat16"
    assert name.endswith(".bias"), "Megatron decays every other parameter of two dimensions"
    assert bias.sequence_parallel
    one_hot = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    logits = module["modality_bias"](torch.zeros(2, 1, 4), one_hot).squeeze(1)
    assert logits.tolist() == [[pytest.approx(0.1)] * 4, [0.0] * 4]


def test_recorded_routing_is_summed_over_batches_and_the_recorder_is_removed(single_rank, vision):
    from megatron_smar.monitoring.recorder import recorded_routing

    model = build_model(vision).eval()
    with torch.no_grad(), recorded_routing([model]) as recorder:
        model(**inputs())
        once = recorder.statistics[1].tokens.tolist()
        model(**inputs())
    assert once == [24 - 8 + 16, 8]
    assert recorder.statistics[1].tokens.tolist() == [2 * x for x in once]
    assert list(recorder.distances(2, 1e-6)) == [1, 2, 3]
    for shares in recorder.expert_shares().values():
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert all(not layer.mlp.router.recorders for layer in model.language_model.decoder.layers)


def test_metrics_average_over_layers_and_comparable_micro_batches(single_rank):
    from megatron_smar.monitoring.config import MonitorConfig
    from megatron_smar.monitoring.tracker import RoutingMetricsTracker
    from megatron_smar.routing import RoutingStatistics
    from megatron_smar.routing.router import MRD_DISTANCE, RoutingReport
    from megatron_smar.routing.strategies.base import Weighted
    from megatron_smar.routing.strategies.smar import SMAR_LOSS, SmarConfig

    class Writer(dict):
        def add_scalar(self, name, value, iteration):
            self[name] = float(value)

    tracker, writer = RoutingMetricsTracker(MonitorConfig(metrics=SmarConfig.metrics)), Writer()
    nothing = RoutingStatistics(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2))
    for layer, distance in ((1, 2.0), (2, 4.0)):
        for comparable in (1.0, 0.0):  # the second micro-batch is only text
            measures = {MRD_DISTANCE: Weighted(torch.tensor(distance * comparable), torch.tensor(comparable))}
            tracker.observe(RoutingReport(layer, 2, nothing, {SMAR_LOSS: torch.tensor(comparable)}, measures))
    totals: dict[str, torch.Tensor] = {}
    line = tracker.report(0.5, 1, writer, num_layers=2, total_loss_dict=totals, track_names=[])
    assert writer["mrd distance"] == 3.0
    assert (writer["moe/mrd_distance_layer_1"], writer["moe/mrd_distance_layer_2"]) == (2.0, 4.0)
    assert writer["smar loss"] == pytest.approx(0.5)
    assert "mrd distance: 3.0000 |" in line
    assert float(totals["smar loss"]) == pytest.approx(0.5)
