# SPDX-License-Identifier: Apache-2.0
"""The configs built from flags, and the flags that are refused; the functional tests run the same as a user would."""

import sys

import pytest

from tests.launch import SMALL_MODEL


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> str:
    from tests.models import build_hf_model

    folder = tmp_path_factory.mktemp("vision")
    build_hf_model(image_token_id=5).model.vision_tower.save_pretrained(folder)
    return str(folder)


def parse(monkeypatch, vision: str, *flags: str):
    from megatron_smar import runtime

    runtime.install()
    from megatron.training.arguments import parse_args

    from megatron_smar.config.flags import add_arguments

    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *SMALL_MODEL, "--vision-model", vision, *flags])
    return parse_args(add_arguments)


def test_defaults_are_the_papers(monkeypatch, vision):
    from megatron_smar.config.build import modality_routing_config

    routing = modality_routing_config(parse(monkeypatch, vision, "--modality-routing", "smar"))
    smar = routing.strategy
    assert (smar.coeff, smar.d_min, smar.d_max, routing.eps, routing.scope) == (0.01, 1.5, 2.0, 1e-6, "global")
    assert routing.router_bias
    assert not modality_routing_config(parse(monkeypatch, vision, "--no-modality-router-bias")).router_bias
    assert modality_routing_config(parse(monkeypatch, vision)).strategy.name == "none"


def test_without_a_gpu_the_defaults_are_the_cpus_and_flags_win(monkeypatch, vision):
    args = parse(monkeypatch, vision)
    assert (args.distributed_backend, args.transformer_impl, args.use_cpu_initialization) == ("gloo", "local", True)
    assert parse(monkeypatch, vision, "--distributed-backend", "nccl").distributed_backend == "nccl"


SKIPS = "--skip-unused-experts --num-experts 4 --moe-token-dispatcher-type alltoall".split()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--smar-eps", "0"], "--smar-eps is 0.0"),
        (["--smar-coeff", "-1"], "--smar-coeff is -1.0"),
        (
            ["--modality-routing", "smar", "--smar-start-iter", "10", "--smar-end-iter", "10"],
            "--smar-end-iter is 10, but the loss acts from --smar-start-iter 10; give a later step",
        ),
        (["--smar-end-iter", "10"], "--smar-end-iter has no effect with --modality-routing none"),
        (["--moe-collapse-threshold", "0"], "--moe-collapse-threshold is 0.0"),
        (["--pixel-shuffle", "0.3"], "--pixel-shuffle is 0.3"),
        (["--max-tiles", "2", "--min-tiles", "4"], "--max-tiles 2 is less than --min-tiles 4"),
        (["--use-thumbnail"], "--use-thumbnail .* --max-tiles 12"),
        (
            ["--skip-unused-experts", "--moe-token-dispatcher-type", "allgather"],
            "--moe-token-dispatcher-type allgather does not dispatch here; give alltoall",
        ),
        (["--skip-unused-experts", "--num-experts", "4", "--moe-layer-freq", "[1,0]"], "the last layer has no experts"),
        (
            [*SKIPS, "--expert-tensor-parallel-size", "2"],
            "give --expert-tensor-parallel-size 1 instead of 2",
        ),
        (
            [*SKIPS, "--moe-expert-capacity-factor", "1.5"],
            "--moe-expert-capacity-factor 1.5: an expert's slots are counted for all tokens",
        ),
        (
            [*SKIPS, "--moe-router-padding-for-quantization"],
            "can leave fewer tokens than an expert is padded to",
        ),
        (["--balance-vision", "--freeze", "connector"], "--balance-vision is for a frozen vision encoder"),
        (
            ["--balance-vision", "--disable-gloo-process-groups"],
            "--balance-vision exchanges numbers of tiles over Gloo",
        ),
        (["--peak-tflops", "0"], "--peak-tflops is 0.0; give the device's peak"),
        (["--smar-warmup-iters", "-1"], "--smar-warmup-iters is -1"),
        (["--smar-start-iter", "-1"], "--smar-start-iter is -1"),
        (["--smar-band-file", "nowhere.json"], "--smar-band-file nowhere.json cannot be read"),
        (["--recompute-modules", "layernorm"], "--recompute-modules layernorm"),
        (["--moe-pad-expert-input-to-capacity"], "--moe-pad-expert-input-to-capacity"),
        (["--moe-expert-rank-capacity-factor", "1.5"], "--moe-expert-rank-capacity-factor 1.5 drops tokens in the"),
        (["--moe-enable-routing-replay"], "--moe-enable-routing-replay is for programs that record"),
        (["--moe-router-load-balancing-type", "quantile_balancing"], "quantile_balancing"),
        (["--dataloader-type", "cyclic"], "--dataloader-type is cyclic"),
        (["--qk-l2-norm"], "--qk-l2-norm is implemented in none of the layers"),
        (["--optimizer-cuda-graph"], "--optimizer-cuda-graph replays"),
        (["--use-megatron-fsdp"], "--use-megatron-fsdp is not supported"),
        (["--modality-routing", "hard", "--hard-experts", "text=0", "vision=1-3"], "leaves text tokens 1 experts"),
        (
            ["--modality-routing", "smar", "--hard-experts", "text=0"],
            "--hard-experts text=0 has no effect with --modal",
        ),
        (
            ["--layer-split-experts", "text=0"],
            "--layer-split-experts text=0 has no effect with --modality-routing none",
        ),
        (["--layer-split-layers", "1"], "--layer-split-layers 1 has no effect with --modality-routing none"),
        (["--ernie-bias-rate", "0.1"], "--ernie-bias-rate 0.1 has no effect with --modality-routing none"),
        (
            ["--modality-routing", "label_ce", "--label-ce-experts", "text=0-4"],
            "--label-ce-experts text=0-4 must name each",
        ),
        (
            ["--modality-routing", "modality_balance", "--modality-balance-coeff", "video=1"],
            "--modality-balance-coeff video=1 must name each of text, vision at most once",
        ),
        (
            [
                *["--modality-routing", "modality_balance", "--moe-aux-loss-coeff", "0.1"],
                *["--moe-router-load-balancing-type", "aux_loss"],
            ],
            "--moe-aux-loss-coeff 0.1 would balance the same tokens as --modality-routing modality_balance",
        ),
        (["--modality-routing", "ernie", "--moe-router-fusion"], "--moe-router-fusion would choose experts without"),
        (
            ["--modality-routing", "ernie", "--moe-router-load-balancing-type", "sinkhorn"],
            "--moe-router-load-balancing-type sinkhorn would choose experts without the bias of --modality-routing",
        ),
        (["--modality-routing", "ernie", "--moe-enable-routing-replay"], "--moe-enable-routing-replay would choose"),
        (["--modality-routing", "ernie", "--smar-scope", "local"], "--smar-scope local with --modality-routing ernie"),
        (["--modality-routing", "ernie", "--ernie-experts", "text=0", "vision=1-3"], "leaves text tokens 1 experts"),
        (["--modality-routing", "hard", "--moe-router-group-topk", "1"], "--moe-router-group-topk 1 can choose"),
        (
            ["--loss-weighting", "sqrt", "--calculate-per-token-loss"],
            "--loss-weighting sqrt and --calculate-per-token-loss are two means",
        ),
        (["--mtp-num-layers", "1"], "--mtp-num-layers 1 adds a loss"),
        (["--moiie-coeff", "-1"], "--moiie-coeff is -1.0"),
        (["--moiie-experts", "text=0"], "--moiie-experts text=0 has no effect with --modality-routing none"),
        (["--modality-routing", "moiie", "--moiie-experts", "text=0"], "must name each of text, shared, vision once"),
        (
            ["--modality-routing", "moiie", "--moiie-experts", "text=0.75", "shared=.0", "vision=0.25"],
            "leaves vision tokens 1 experts",
        ),
        (["--bf16", "--modality-routing", "smar", "--save", "run"], "only with --use-distributed-optimizer"),
    ],
)
def test_what_cannot_train_is_refused_in_one_sentence(monkeypatch, vision, flags, said):
    from megatron_smar.config.checks import check_arguments

    with pytest.raises(ValueError, match=said) as error:
        check_arguments(parse(monkeypatch, vision, *flags), needs_data=False)
    assert "\n" not in str(error.value)


def test_latent_attention_without_yarn_is_refused_with_rope_fusion(monkeypatch, vision):
    from megatron_smar.config.checks import check_shape

    args = parse(monkeypatch, vision, "--multi-latent-attention", "--rope-type", "rope")
    check_shape(args)
    args.apply_rope_fusion = True  # the default where there is Transformer Engine
    with pytest.raises(ValueError, match="give --no-rope-fusion"):
        check_shape(args)


def test_layers_without_a_band_or_coefficient_in_the_file_have_the_common_one(monkeypatch, vision, tmp_path):
    from megatron_smar.config.build import modality_routing_config

    content = '{"2": [0.5, 1], "3": {"coeff": 0.25}, "4": {"band": [1, 2], "coeff": 0}}'
    (tmp_path / "bands.json").write_text(content)
    flags = ["--modality-routing", "smar", "--smar-band-file", str(tmp_path / "bands.json"), "--smar-coeff", "0.125"]
    routing = modality_routing_config(parse(monkeypatch, vision, *flags)).strategy
    assert [routing.band(layer) for layer in range(1, 5)] == [(1.5, 2.0), (0.5, 1.0), (1.5, 2.0), (1.0, 2.0)]
    assert [routing.coefficient(layer, 0) for layer in range(1, 5)] == [0.125, 0.125, 0.25, 0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2]", "is not a JSON object"),
        ('{"1": 2}', "is not a JSON object"),
        ('{"one": [1, 2]}', "is not a JSON object"),
        ('{"1": [1, 2', "cannot be read"),
        ('{"1": [2, 1]}', "gives layer 1 \\[2.0, 1.0\\]"),
        ('{"1": {"band": [1, 2], "coef": 1}}', "'coef' is neither band nor coeff"),
        ('{"1": {"coeff": -1}}', "gives layer 1 the coefficient -1.0; give 0 or more"),
        ('{"3": [1, 2]}', "names layer 3, but the MoE layers are \\[1, 2\\]"),
    ],
)
def test_an_invalid_band_file_is_refused_in_one_sentence(monkeypatch, vision, tmp_path, content, said):
    from megatron_smar.config.checks import check_arguments

    (tmp_path / "bands.json").write_text(content)
    args = parse(monkeypatch, vision, "--modality-routing", "smar", "--smar-band-file", str(tmp_path / "bands.json"))
    with pytest.raises(ValueError, match=said) as error:
        check_arguments(args, needs_data=False)
    assert "\n" not in str(error.value)


def test_help_lists_the_groups_of_this_project(monkeypatch, vision, capsys):
    """Megatron 0.19.2's own --help fails on a percent sign."""
    with pytest.raises(SystemExit) as end:
        parse(monkeypatch, vision, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for group in ("modality-aware routing:", "vision-language model:", "training stages:", "loss:", "conversations:"):
        assert group in text


def test_normalization_is_the_vision_models_own(tmp_path):
    import json

    from transformers import CLIPVisionConfig, CLIPVisionModel

    from megatron_smar.model.vision import VisionConfig, normalization

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    vision = VisionConfig(str(tmp_path), 32)
    assert normalization(vision)[0] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert normalization(vision) == ((0.1, 0.2, 0.3), (1, 2, 3))


def test_a_failed_check_of_megatrons_is_reported_with_the_flags_of_its_arguments_and_their_values(vision, monkeypatch):
    from megatron_smar.config.flag_errors import sentence

    args = parse(monkeypatch, vision, "--num-layers", "3", "--pipeline-model-parallel-size", "2")
    message = "num_layers should be a multiple of\n  pipeline_model_parallel_size"
    said = sentence(AssertionError(message), args)
    assert said.startswith("num_layers should be a multiple of pipeline_model_parallel_size; the flags are: ")
    assert "--num-layers 3" in said and "--pipeline-model-parallel-size 2" in said and "\n" not in said
    assert sentence(ValueError("--lr is 0; give more."), args) == "--lr is 0; give more."
    try:
        assert args.num_layers == 4
    except AssertionError as error:
        error.args = ()
        assert "`assert args.num_layers == 4`" in sentence(error, args) and "--num-layers 3" in sentence(error, args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-attention-heads", "4", "--tensor-model-parallel-size", "3"], "--num-attention-heads 4 .*size 3"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size is 0"),
        (["--pipeline-model-parallel-size", "2"], "--pipeline-model-parallel-size 2 .* 2 ranks, and there are 1"),
        (["--micro-batch-size", "4", "--global-batch-size", "6"], "--global-batch-size 6 .* --micro-batch-size 4"),
        (
            ["--micro-batch-size", "2", "--global-batch-size", "8", "--eval-global-batch-size", "3"],
            "--eval-global-batch-size 3 is not a multiple of --micro-batch-size 2",
        ),
        (["--num-experts", "4", "--moe-token-dispatcher-type", "flex"], "flex .*DeepEP"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_given_flags(vision, monkeypatch, flags, said):
    from megatron_smar.config.checks import check_arguments

    with pytest.raises(ValueError, match=said):
        check_arguments(parse(monkeypatch, vision, *flags), needs_data=False)


BENCHMARKS = ["--eval-benchmarks", "pope", "--eval-benchmarks-data", "benchmarks", "--eval-iters", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-benchmarks", "pope", "--eval-iters", "1"], "pope needs --eval-benchmarks-data"),
        ([*BENCHMARKS, "--eval-iters", "0"], "give --eval-iters and --eval-interval"),
        ([*BENCHMARKS, "--eval-benchmarks-samples", "0"], "--eval-benchmarks-samples is 0"),
        ([*BENCHMARKS, "--pipeline-model-parallel-size", "2"], "cannot be asked under --pipeline-model-parallel-size"),
        ([*BENCHMARKS, "--context-parallel-size", "2"], "--context-parallel-size: leave these out"),
        ([*BENCHMARKS, "--moe-token-dispatcher-type", "allgather"], "allgather cannot dispatch: give alltoall"),
        ([*BENCHMARKS, "--conversation-template", "plain"], "--conversation-template plain leaves out"),
    ],
)
def test_benchmarks_that_cannot_be_asked_during_training_are_refused(monkeypatch, vision, flags, message):
    from megatron_smar.config.checks import _check_benchmarks

    with pytest.raises(ValueError, match=message):
        _check_benchmarks(parse(monkeypatch, vision, *flags))
    _check_benchmarks(parse(monkeypatch, vision, *BENCHMARKS))


def test_the_collapse_warning_advises_a_flag_that_the_strategy_refuses(monkeypatch, vision):
    from megatron_smar.config.checks import check_arguments
    from megatron_smar.routing.strategies import STRATEGIES

    balanced = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"]
    advised = [name for name, config in STRATEGIES.items() if balanced[2] in config.collapse_remedy]
    assert {"none", "smar", "smoes", "hard"} <= set(advised) < set(STRATEGIES)
    own = {"smoes": ("--smoes-bins", "2"), "layer_split": ("--layer-split-layers", "1")}
    for name in advised:
        flags = ("--modality-routing", name, *own.get(name, ()), *balanced)
        check_arguments(parse(monkeypatch, vision, *flags), needs_data=False)
