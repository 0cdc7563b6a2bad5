# SPDX-License-Identifier: Apache-2.0
"""This project's flags, as argument groups of Megatron's parser. `build` makes configs of them, `checks` validates."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import get_args

from megatron_smar import runtime
from megatron_smar.config.dataclass_flags import add_config_flags
from megatron_smar.config.flag_errors import explain_unknown_flags
from megatron_smar.data.loss_weighting import LOSS_WEIGHTINGS
from megatron_smar.modalities import Modalities
from megatron_smar.model.connector import ConnectorType
from megatron_smar.model.parts import PARTS
from megatron_smar.monitoring.config import MonitorConfig
from megatron_smar.reliability.config import ReliabilityConfig
from megatron_smar.routing.config import ModalityRoutingConfig
from megatron_smar.routing.strategies import STRATEGIES
from megatron_smar.runtime.console import ALL_MESSAGES

CONNECTORS = get_args(ConnectorType)


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds this project's groups and this environment's defaults to Megatron's parser (`extra_args_provider`)."""
    _add_routing_arguments(parser)
    _add_vision_arguments(parser)
    _add_language_arguments(parser)
    _add_stage_arguments(parser)
    _add_loss_arguments(parser)
    _add_conversation_arguments(parser)
    _add_benchmark_arguments(parser)
    _add_checkpoint_arguments(parser)
    add_config_flags(
        parser.add_argument_group("reliability", "Damaged checkpoints, full disks, hangs; docs/reliability.md."),
        ReliabilityConfig,
    )
    parser.add_argument_group("console").add_argument(
        ALL_MESSAGES,
        action="store_true",
        help="Print everything that Megatron and torch print: each argument, warnings that nobody can act on, all "
        "columns of a step. Default: the summary and a line per --log-interval.",
    )
    _repair_help(parser)
    explain_unknown_flags(parser)
    # Megatron 0.19.2 leaves eval_interval at None and then divides by it. A run that gets a signal to end saves first.
    defaults = {"dataloader_type": "external", "eval_interval": 1000, "exit_signal_handler": True}
    # --async-save needs no other flag: it is written by runtime.asynchronous.
    defaults |= {"use_persistent_ckpt_worker": True, "async_strategy": "mcore"}
    parser.set_defaults(**defaults, **runtime.argument_defaults())
    return parser


def _repair_help(parser: ArgumentParser) -> None:
    """Escapes bare percent signs: one of Megatron 0.19.2's help texts has one, which makes its `--help` fail."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError):
            action.help = action.help.replace("%", "%%") if action.help else None


def _add_routing_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("modality-aware routing", "SMAR (arXiv 2506.06406) and others; docs/routing.md.")
    common = ModalityRoutingConfig()
    group.add_argument(
        "--modality-routing",
        choices=list(STRATEGIES),
        default=common.strategy.name,
        help="Routing strategy. "
        + "".join(f"{name}: {config.title}; " for name, config in STRATEGIES.items()).replace("%", "%%")
        + "default: %(default)s.",
    )
    for config in STRATEGIES.values():
        add_config_flags(group, config)
    group.add_argument(
        "--smar-eps",
        type=float,
        default=common.eps,
        help="Smoothing of the distributions, which keeps the distance finite. Default: %(default)s.",
    )
    group.add_argument(
        "--smar-scope",
        choices=["global", "local"],
        default=common.scope,
        help="global: statistics over all tokens of the micro-batch step on all ranks; local: over the tokens of each "
        "data-parallel replica separately. Default: %(default)s.",
    )
    group.add_argument(
        "--no-modality-router-bias",
        action="store_false",
        dest="modality_router_bias",
        help="Leave out the trainable bias per modality and expert on the router's logits.",
    )
    group.add_argument(
        "--moe-collapse-threshold",
        type=float,
        metavar="SHARE",
        default=MonitorConfig().collapse_threshold,
        help="Warn when more than this share of a modality's tokens chooses the same expert of a layer, over the steps "
        "of a --log-interval; 1 switches the warning off. Default: %(default)s.",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="The device's peak in TFLOP/s, which MFU is a share of. Default: the data sheet's, in bf16, of GPUs that "
        "are known (A100, H100, H200, B200, ...); for others no MFU is logged.",
    )


def _add_vision_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("vision-language model")
    group.add_argument(
        "--vision-model",
        metavar="PATH_OR_NAME",
        help="Hugging Face vision encoder (InternViT, CLIP, SigLIP), or a model that contains one. "
        "The paper: InternViT-300M.",
    )
    group.add_argument(
        "--image-modalities",
        nargs="+",
        metavar="NAME",
        default=list(Modalities().images),
        help="Kinds of images, each a modality with its own routing statistics and router bias. vision is the kind of "
        "all images whose record does not name another in `image_modality`. NAME's placeholder is <NAME_CONTEXT>, "
        "which the tokenizer must have (tools/data/add_tokens.py --also). Default: vision.",
    )
    group.add_argument(
        "--balance-vision",
        action="store_true",
        help="Share the frozen vision encoder's work evenly between data-parallel replicas in each micro-batch: those "
        "with more tiles send pixels to those with fewer, and get the features back.",
    )
    group.add_argument(
        "--image-size", type=int, default=448, help="Side of a tile in pixels. Default: %(default)s, the paper's."
    )
    group.add_argument(
        "--min-tiles", type=int, default=1, help="Fewest tiles per image, without thumbnail. Default: %(default)s."
    )
    group.add_argument(
        "--max-tiles",
        type=int,
        default=1,
        help="Most tiles per image, without thumbnail: an image is split into the grid closest to its aspect ratio, as "
        "InternVL does. 1: every image is one tile. VITA: 12. Default: %(default)s.",
    )
    group.add_argument(
        "--use-thumbnail",
        action="store_true",
        help="Add the full image as a last tile if there is more than one tile, as InternVL and VITA do.",
    )
    group.add_argument(
        "--connector",
        choices=CONNECTORS,
        default="mlp2x_gelu",
        help="Linear-GELU-Linear (the paper, VITA), or InternVL's with a LayerNorm first. Default: %(default)s.",
    )
    group.add_argument(
        "--pixel-shuffle",
        type=float,
        default=0.5,
        help="Factor of the pixel shuffle; 0.5 folds 2 x 2 patches into one token. Default: %(default)s.",
    )
    group.add_argument(
        "--vision-feature-layer",
        type=int,
        default=-1,
        help="Which hidden state of the encoder gives the features (LLaVA with CLIP: -2). Default: %(default)s.",
    )
    group.add_argument(
        "--vision-feature-scale",
        type=float,
        default=1.0,
        help="Multiplies the features before the shuffle; VITA's checkpoints use 0.5. Default: %(default)s.",
    )


def _add_language_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "language model",
        "In addition to Megatron's flags; tools/checkpoint/convert.py writes what a model needs into flags.txt.",
    )
    group.add_argument(
        "--parallel-block",
        action="store_true",
        help="Attention and feed-forward layer in parallel, after one norm (Phi).",
    )
    group.add_argument("--output-bias", action="store_true", help="The output layer has a bias (Phi).")
    group.add_argument(
        "--gelu-tanh",
        action="store_true",
        help="Use the tanh approximation of GELU, with or without fused kernels (Phi). Default: Megatron's GELU, which "
        "is exact without fused kernels and approximate with them.",
    )
    group.add_argument(
        "--qk-norm-scope",
        choices=["head", "projection"],
        default="head",
        help="What --qk-layernorm normalizes: each head, or all heads of the projection together (OLMoE). "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--latent-norm-epsilon",
        type=float,
        help="Epsilon of the norms inside multi-latent attention (DeepSeek: 1e-6). Default: --norm-epsilon.",
    )
    group.add_argument(
        "--skip-unused-experts",
        action="store_true",
        help="While training, compute the experts of the last layer only at positions whose loss counts: no other "
        "output of that layer is read. Gradients are the same, and all tokens are still routed and counted.",
    )


def _add_stage_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("training stages")
    group.add_argument(
        "--freeze",
        nargs="*",
        choices=PARTS,
        default=["vision"],
        help="Parts that are not trained. Stage 1, visual alignment: vision language. Stage 2, visual instruction "
        "tuning: vision. Language pretraining: vision connector. Parts of the language model: embeddings (with the "
        "output layer), attention, norms, dense (feed-forward layers without experts), experts (also shared ones) and "
        "router (with the modality bias). To train only experts and router, as in MoE-LLaVA's last stage: vision "
        "connector embeddings attention norms dense. Default: vision.",
    )


def _add_loss_arguments(parser: ArgumentParser) -> None:
    parser.add_argument_group("loss", "The mean that is minimized; docs/routing.md compares the choices.").add_argument(
        "--loss-weighting",
        choices=LOSS_WEIGHTINGS,
        help="Minimize sum(w * loss) / sum(w) over all tokens of a step on all replicas, with n the loss tokens of a "
        "token's sample: token: w is 1; sample: 1 / n, every sample weighs the same; sqrt: 1 / sqrt(n), as Qwen3-VL "
        "and InternVL3.5 do to keep long text answers and short visual ones in balance. Only the training loss is "
        "weighted: the validation loss stays the mean over tokens. Default: Megatron's mean over a micro-batch's "
        "tokens, then over micro-batches and replicas.",
    )


def _add_conversation_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "conversations",
        "--data-path takes one folder of shards made by tools/data/prepare.py, or an energon metadataset, on a "
        "local disk or at http://HOST/PATH, s3://BUCKET/PATH or msc://PROFILE/PATH.",
    )
    group.add_argument(
        "--conversation-template",
        default="mistral",
        help="How turns become text: plain (the paper's stage 1: image, then caption), mistral, vita, vicuna_v1 or "
        "chatml. Default: %(default)s.",
    )
    group.add_argument(
        "--rejects-dir",
        default=None,
        help="Folder for the list of samples that were skipped, each with its reason; "
        "`python tools/data/rejects.py FOLDER` counts them.",
    )
    group.add_argument(
        "--max-skip-ratio",
        type=float,
        metavar="SHARE",
        default=0.1,
        help="Stop when more than this share of the samples that a data worker reads cannot be used (by a margin of "
        "three standard deviations, and not before its 100th sample); 1 never stops. Default: %(default)s.",
    )
    group.add_argument(
        "--dataloader-save",
        default=None,
        help="Folder for the data loader's state, saved with each checkpoint. Default: dataloader/ in --save.",
    )
    group.add_argument(
        "--no-load-dataloader-state",
        action="store_false",
        dest="load_dataloader_state",
        help="When resuming, read the data from the start instead of from the checkpoint's position.",
    )
    group.add_argument(
        "--record-samples",
        metavar="FOLDER",
        help="Folder in which each data-parallel rank writes the keys of the samples of each step. Default: none.",
    )
    group.add_argument(
        "--shuffle-buffer-size",
        type=int,
        default=1000,
        help="Samples among which each data worker shuffles. Default: %(default)s.",
    )
    group.add_argument(
        "--text-only-ratio",
        type=float,
        metavar="SHARE",
        help="Share of samples without images, kept exactly (the paper: 0.025). Default: the share in the data.",
    )
    group.add_argument(
        "--packing-buffer-size",
        type=int,
        metavar="SAMPLES",
        help="Pack samples into sequences of at most --seq-length, in which each sample attends only to itself: how "
        "many samples a data worker keeps to choose from (1000 or more fill best). Needs --micro-batch-size 1; batch "
        "sizes then count packs. Default: one sample per sequence.",
    )
    group.add_argument(
        "--packing-max-tiles",
        type=int,
        metavar="TILES",
        help="Most image tiles in a pack, which limits the vision encoder's work and memory. Default: no limit.",
    )


def _add_benchmark_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(
        "multimodal benchmarks during training",
        "Asked after each validation (--eval-interval, --eval-iters), logged and saved; docs/evaluation.md.",
    )
    group.add_argument(
        "--eval-benchmarks",
        nargs="+",
        metavar="NAME",
        default=[],
        help="vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench or mmvet. Default: none.",
    )
    group.add_argument(
        "--eval-benchmarks-data", metavar="FOLDER", help="Folder with a folder for each benchmark, of its name."
    )
    group.add_argument(
        "--eval-benchmarks-samples",
        type=int,
        metavar="SAMPLES",
        default=200,
        help="Questions of each benchmark, evenly spread. Default: %(default)s.",
    )
    group.add_argument(
        "--eval-benchmarks-batch-size",
        type=int,
        metavar="SAMPLES",
        default=8,
        help="Questions that a rank answers together. Default: %(default)s.",
    )


def _add_checkpoint_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--allow-model-change",
        nargs="+",
        metavar="FLAG",
        default=[],
        help="Flags of the model, and `tokenizer`, that may differ from those of the checkpoint in --load, such as: "
        "rotary-base moe-router-topk. Default: none; a checkpoint of another model is refused.",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="Save the distributed optimizer's state as it is sharded over the ranks: each rank needs less host memory "
        "while saving, but the run can only be resumed with the same TP, PP, EP and ETP. Default: a run can be resumed "
        "with any layout.",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
