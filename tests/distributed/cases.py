# SPDX-License-Identifier: Apache-2.0
"""The parallel layouts that are compared with one process, with their models and settings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.distributed.batches import LENGTH, PACK_LENGTH, PACKS, ROWS, VOCABULARY
from tests.launch import SMALL_MODEL

# Everything that a case may override; every layer's distance is outside the band.
COMMON = [
    *SMALL_MODEL,
    *f"""
    --seq-length {LENGTH} --max-position-embeddings {LENGTH} --init-method-std 0.1 --tokenizer-type NullTokenizer
    --vocab-size {VOCABULARY} --clip-grad 0 --weight-decay 0 --lr 1
    --lr-decay-style constant
    --smar-coeff 0.5 --smar-d-min 3 --smar-d-max 4 --smar-eps 1e-3
    """.split(),
]

# With SGD and a learning rate of 1 the difference of the weights is the gradient g.
DESCENT = "--optimizer sgd --sgd-momentum 0".split()
# With Adam, which the distributed optimizer requires, without moments and with eps 1 it is g / (|g| + 1).
SIGNED = "--optimizer adam --adam-beta1 0 --adam-beta2 0 --adam-eps 1".split()

MODELS: dict[str, list[str]] = {
    "mixtral": [],
    "four layers": ["--num-layers", "4"],
    "shared experts": ["--moe-shared-expert-intermediate-size", "64"],
    "dense layers between": ["--num-layers", "4", "--moe-layer-freq", "([0,1]*2)"],
    "softmax before top-k": ["--moe-router-pre-softmax"],
    "sigmoid scores with expert bias": [
        *["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"],
        *["--moe-router-bias-update-rate", "0.1", "--moe-router-dtype", "fp32"],
    ],
    "group-limited": [
        *["--num-experts", "8", "--moe-router-num-groups", "4", "--moe-router-group-topk", "2"],
        *["--moe-router-pre-softmax"],
    ],
    "parallel block": ["--parallel-block", "--output-bias", "--normalization", "LayerNorm"],
    "norms per head": ["--qk-layernorm"],
    "norms over all heads": ["--qk-layernorm", "--qk-norm-scope", "projection"],
    "latent attention": [
        *["--multi-latent-attention", "--rope-type", "rope", "--qk-layernorm", "--q-lora-rank", "8"],
        *["--kv-lora-rank", "12", "--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "6"],
    ],
}


@dataclass(frozen=True)
class Setting:
    """What determines the result, whatever the layout: one run of one process is the reference of all its cases.

    Attributes:
        model: One of `MODELS`.
        batch: Name for `batches.make_batch`.
        micro_batches: Gradient accumulation steps.
        flags: Further flags: routing, loss, what is frozen.
        steps: Number of optimizer steps. With two, the second depends on statistics that the first accumulated.
    """

    model: str = "mixtral"
    batch: str = "mixed"
    micro_batches: int = 1
    flags: tuple[str, ...] = ("--modality-routing", "smar", "--freeze", "vision")
    steps: int = 1


@dataclass(frozen=True)
class Case:
    """One layout, to be compared with one process.

    Attributes:
        name: Name of the case, and the first column of the table.
        ranks: Number of processes.
        data_parallel: Number of data-parallel replicas, over which the batch is split.
        layout: Flags of the parallel layout.
        setting: What is trained.
        reference: Setting of the one process that the case is compared with, if it differs.
        dtype: float64, except where Megatron supports only float32, or bfloat16 is tested.
        adam: Whether the optimizer is `SIGNED`.
        core: Part of `make test`; the others run with `make test-matrix`.
        logs_its_loss: Whether the reference logs the loss that it minimizes. Megatron logs the mean over all tokens
            also where it minimizes the mean of the micro-batches' means.
    """

    name: str
    ranks: int
    data_parallel: int
    layout: str
    setting: Setting = Setting()
    reference: Setting | None = None
    dtype: str = "float64"
    adam: bool = False
    core: bool = False
    logs_its_loss: bool = True

    def flags(self) -> list[str]:
        """Returns the complete command line except for the batch and the folder."""
        setting = self.setting
        packed = setting.batch.startswith("packed")
        total = PACKS if packed else ROWS
        rows = total // setting.micro_batches // self.data_parallel
        optimizer = SIGNED if self.adam else DESCENT
        layout = ["--global-batch-size", str(total), "--micro-batch-size", str(rows), *self.layout.split()]
        if packed:
            layout += ["--seq-length", str(PACK_LENGTH), "--max-position-embeddings", str(PACK_LENGTH)]
        model = MODELS[setting.model]
        # Megatron refuses the two flags together, and a switch cannot be unset by a later flag.
        common = [
            flag for flag in COMMON if flag != "--group-query-attention" or "--multi-latent-attention" not in model
        ]
        steps = ["--train-iters", str(setting.steps)]
        return [*common, "--no-save-optim", *optimizer, *model, *steps, *setting.flags, *layout]


TP = "--tensor-model-parallel-size 2 --sequence-parallel"
TP_SP = f"{TP} --expert-tensor-parallel-size 1"
PP = "--pipeline-model-parallel-size 2"
VIRTUAL = f"{PP} --num-layers-per-virtual-pipeline-stage 1"
CP = "--context-parallel-size 2"
EP = "--expert-model-parallel-size 2"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE_ALL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SMAR = ("--modality-routing", "smar", "--freeze", "vision")
PLAIN = ("--modality-routing", "none", "--freeze", "vision")
STAGE_1 = ("--modality-routing", "none", "--freeze", "vision", "language")
PER_TOKEN = (*SMAR, "--calculate-per-token-loss")
SMOES = (
    *("--modality-routing", "smoes", "--smoes-bins", "2", "--smoes-information-coeff", "0.5"),
    *("--smoes-balance-coeff", "0.5", "--smoes-decay", "0.5"),
)
# Each has all cases of `_every_layout`.
STRATEGIES: dict[str, tuple[str, ...]] = {
    **{f"SMoES, {scores} scores": (*SMOES, "--smoes-scores", scores) for scores in ("attention", "gaussian", "hard")},
    "hard routing": ("--modality-routing", "hard", "--num-experts", "8", "--hard-experts", "text=0,5-7", "vision=1-4"),
    "modality gates": ("--modality-routing", "modality_gates"),
    "MoIIE": (
        *["--modality-routing", "moiie", "--moiie-coeff", "0.5", "--num-experts", "8"],
        *["--moiie-experts", "text=0,7", "shared=2-5", "vision=1,6"],
    ),
    "label loss": (
        *("--modality-routing", "label_ce", "--label-ce-coeff", "0.5"),
        *("--label-ce-experts", "text=1,3", "vision=0,2"),
    ),
    "modality balance": (
        "--modality-routing",
        "modality_balance",
        "--modality-balance-coeff",
        "text=0.5",
        "vision=0.1",
    ),
    "ERNIE": (
        *("--modality-routing", "ernie", "--num-experts", "8", "--ernie-experts", "text=0,5-7", "vision=1-4"),
        *("--ernie-balance-coeff", "text=0.5", "vision=0.1", "--ernie-orthogonal-coeff", "0.5"),
        *("--ernie-bias-rate", "0.05"),
    ),
}
FREEZES = {
    "nothing": (),
    "vision": ("vision",),
    "connector": ("connector",),
    "language": ("language",),
    "vision, connector": ("vision", "connector"),
    "vision, language": ("vision", "language"),
    "connector, language": ("connector", "language"),
}


def cases() -> Iterator[Case]:
    """Yields all cases; every feature appears at least once."""
    deep = Setting(model="four layers")
    yield Case("DP 2", 2, 2, "", core=True)
    yield Case("DP 4", 4, 4, "")
    yield Case("EP 2", 2, 2, EP, core=True)
    yield Case("EP 4", 4, 4, "--expert-model-parallel-size 4")
    yield Case("TP 2 + SP", 2, 1, TP_SP, core=True)
    yield Case("TP 2 + SP, expert TP 2", 2, 1, f"{TP} --expert-tensor-parallel-size 2")
    yield Case("PP 2", 2, 1, PP, core=True)
    yield Case("PP 2, 4 micro-batches", 2, 1, PP, Setting(micro_batches=4))
    interleaved = Setting("four layers", micro_batches=4)
    # Gloo cannot coalesce the float64 gradients of two chunks with those of the float32 modality bias.
    yield Case("PP 2 interleaved", 2, 1, VIRTUAL, interleaved, dtype="float32", core=True)
    yield Case("CP 2", 2, 1, CP, core=True)
    yield Case("TP 2 x PP 2", 4, 1, f"{TP_SP} {PP}", deep)
    yield Case("TP 2 x EP 2", 2, 1, f"{TP_SP} {EP}")
    yield Case("TP 2 x EP 2 x DP 2", 4, 2, f"{TP_SP} {EP}")
    yield Case("PP 2 x EP 2", 4, 2, f"{PP} {EP}", deep)
    yield Case("CP 2 x EP 2", 2, 1, f"{CP} {EP}")
    yield Case("CP 2 x EP 2 x DP 2", 4, 2, f"{CP} {EP}")
    yield Case("TP 2 x CP 2", 4, 1, f"{TP_SP} {CP}")
    yield Case("DP 2, 4 micro-batches", 2, 2, "", Setting(micro_batches=4))
    yield from _packs()
    yield from _losses()
    yield from _weightings()
    yield from _execution()
    yield from _contents()
    yield from _backbones()
    yield from _strategies()
    yield from _modalities()
    yield from _balanced_vision()
    yield from _skipped_experts()


def _skipped_experts() -> Iterator[Case]:
    """Yields layouts with --skip-unused-experts, compared with one process that computes all experts of all tokens."""
    skips = (*SMAR, "--skip-unused-experts")
    mixed, uneven = (Setting(batch=batch, flags=skips) for batch in ("mixed", "uneven"))
    yield Case("unused experts skipped, one process", 1, 1, "", mixed, Setting(), core=True)
    yield Case("unused experts skipped, EP 2", 2, 2, EP, mixed, Setting())
    yield Case("unused experts skipped, TP 2 x EP 2", 2, 1, f"{TP_SP} {EP}", uneven, Setting(batch="uneven"), core=True)
    pieces = Setting(micro_batches=4, flags=skips)
    yield Case("unused experts skipped, PP 2, 4 micro-batches", 2, 1, PP, pieces, Setting(micro_batches=4))
    one_share = Setting(batch="one share", flags=skips)
    yield Case("unused experts skipped, no loss tokens, CP 2", 2, 1, CP, one_share, Setting(batch="one share"))
    yield Case("unused experts skipped, full recomputation, EP 2", 2, 2, f"{EP} {RECOMPUTE_ALL}", mixed, Setting())
    again = "--recompute-granularity selective --recompute-modules moe"
    yield Case("unused experts skipped, MoE layers recomputed", 1, 1, again, mixed, Setting())
    packs, separate = Setting(batch="packed", flags=skips), Setting()
    yield Case("unused experts skipped, packed, DP 2", 2, 2, "", packs, separate)
    shared = Setting("shared experts", flags=skips)
    yield Case("unused experts skipped, shared experts, EP 2", 2, 2, EP, shared, Setting("shared experts"))
    scores = STRATEGIES["SMoES, attention scores"]
    smoes = Setting(flags=(*scores, "--skip-unused-experts"), steps=2)
    yield Case("unused experts skipped, SMoES, EP 2", 2, 2, EP, smoes, Setting(flags=scores, steps=2))


def _packs() -> Iterator[Case]:
    """Yields packs compared with the same samples in separate rows, with the same samples in each micro-batch."""
    packs, separate = Setting(batch="packed", micro_batches=2), Setting(micro_batches=2)
    yield Case("packed, one process", 1, 1, "", packs, separate)
    yield Case("packed, DP 2", 2, 2, "", Setting(batch="packed"), Setting(), core=True)
    yield Case("packed, CP 2", 2, 1, CP, packs, separate, core=True)
    yield Case("packed, TP 2 + SP", 2, 1, TP_SP, packs, separate)
    yield Case("packed, TP 2 x CP 2", 4, 1, f"{TP_SP} {CP}", packs, separate)
    yield Case("packed, PP 2", 2, 1, PP, packs, separate)
    yield Case("packed, full recomputation, EP 2", 2, 2, f"{EP} {RECOMPUTE_ALL}", Setting(batch="packed"), Setting())
    yield Case("packed, recomputation of attention", 1, 1, "--recompute-granularity selective", packs, separate)


def _losses() -> Iterator[Case]:
    # With the same number of loss tokens in every row the loss is the same as without the flag, so this case also
    # checks the scale, which the other cases have in common with their reference.
    even = Setting(flags=PER_TOKEN)
    yield Case("per-token loss as without it, DP 2", 2, 2, "", even, Setting(), core=True)
    pieces = Setting(micro_batches=4, flags=PER_TOKEN)
    yield Case("per-token loss as without it, EP 2, 4 micro-batches", 2, 2, EP, pieces, Setting(micro_batches=4))
    tokens = Setting(batch="uneven", flags=PER_TOKEN)
    yield Case("per-token loss, DP 2", 2, 2, "", tokens)
    accumulated = Setting(batch="uneven", micro_batches=4, flags=PER_TOKEN)
    yield Case("per-token loss, EP 2, 4 micro-batches", 2, 2, EP, accumulated)
    yield Case("per-token loss, TP 2 + SP", 2, 1, TP_SP, tokens)
    yield Case("per-token loss, CP 2", 2, 1, CP, tokens)
    pipelined = Setting("four layers", "uneven", 4, PER_TOKEN)
    yield Case("per-token loss, PP 2", 2, 1, PP, pipelined)
    yield Case("per-token loss, PP 2 interleaved", 2, 1, VIRTUAL, pipelined, dtype="float32")
    yield Case("uneven loss tokens, CP 2", 2, 1, CP, Setting(batch="uneven"), core=True)
    yield Case("uneven loss tokens, CP 2, 4 micro-batches", 2, 1, CP, Setting(batch="uneven", micro_batches=4))
    # Statistics per replica: global statistics are shared by two replicas, but not by two micro-batches.
    local_scope = (*PLAIN, "--smar-scope", "local")
    replicas, halves = (Setting(batch="uneven", micro_batches=number, flags=local_scope) for number in (1, 2))
    yield Case("uneven loss tokens, CP 2 x EP 2 x DP 2", 4, 2, f"{CP} {EP}", replicas, halves)
    yield Case("no loss tokens in a share, CP 2", 2, 1, CP, Setting(batch="one share"))
    for name, flags in (
        ("z-loss", local_scope),
        ("z-loss, per-token loss", (*local_scope, "--calculate-per-token-loss")),
    ):
        logits, halves = (Setting(micro_batches=n, flags=(*flags, "--moe-z-loss-coeff", "0.1")) for n in (1, 2))
        yield Case(f"{name}, TP 2 + SP", 2, 1, TP_SP, logits, core=flags == local_scope)
        yield Case(f"{name}, CP 2", 2, 1, CP, logits)
        yield Case(f"{name}, TP 2 x CP 2", 4, 1, f"{TP_SP} {CP}", logits)
        yield Case(f"{name}, DP 2", 2, 2, "", logits, halves)
        yield Case(f"{name}, full recomputation, EP 2", 2, 2, f"{EP} {RECOMPUTE_ALL}", logits, halves)
    local = (*SMAR, "--smar-scope", "local")
    halves = Setting(micro_batches=2, flags=SMAR)
    yield Case("local scope, DP 2", 2, 2, "", Setting(flags=local), halves)
    yield Case("local scope, TP 2 + SP", 2, 1, TP_SP, Setting(flags=local), Setting())
    yield Case("local scope, CP 2", 2, 1, CP, Setting(flags=local), Setting())
    tokens_local = Setting(flags=(*local, "--calculate-per-token-loss"))
    halves_by_token = Setting(micro_batches=2, flags=PER_TOKEN)
    yield Case("local scope, per-token loss, DP 2", 2, 2, "", tokens_local, halves_by_token)
    balanced = (*SMAR, "--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.1")
    yield Case("balance loss, TP 2 + SP", 2, 1, TP_SP, Setting(flags=balanced))
    yield Case("balance loss, CP 2", 2, 1, CP, Setting(flags=balanced))
    everywhere = (*SMAR, "--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff")
    yield Case(
        "global balance loss, TP 2 + SP",
        2,
        1,
        TP_SP,
        Setting(flags=(*everywhere, "0.1")),
    )
    # Megatron 0.19.2 averages this loss's gradient over the replicas that share it: on two replicas alpha is halved.
    full, half = (Setting(flags=(*everywhere, alpha)) for alpha in ("0.1", "0.05"))
    yield Case("global balance loss, DP 2 (alpha / 2 on one)", 2, 2, "", full, half)


def _weightings() -> Iterator[Case]:
    """Yields --loss-weighting, on rows with 0 to 28 loss tokens if nothing else is said."""
    balance = ("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.1")
    for weighting in ("sample", "sqrt"):
        flags, name = (*SMAR, "--loss-weighting", weighting), f"{weighting} weighting"
        is_sqrt = weighting == "sqrt"
        rows = Setting(batch="uneven", flags=flags)
        pieces, pipelined = replace(rows, micro_batches=4), replace(rows, model="four layers", micro_batches=4)
        yield Case(f"{name}, DP 2", 2, 2, "", rows)
        yield Case(f"{name}, EP 2, 4 micro-batches", 2, 2, EP, pieces, core=is_sqrt)
        yield Case(f"{name}, TP 2 + SP", 2, 1, TP_SP, rows)
        yield Case(f"{name}, CP 2", 2, 1, CP, rows)
        yield Case(f"{name}, CP 2 x EP 2 x DP 2", 4, 2, f"{CP} {EP}", rows)
        yield Case(f"{name}, PP 2", 2, 1, PP, pipelined)
        yield Case(f"{name}, PP 2 interleaved", 2, 1, VIRTUAL, pipelined, dtype="float32")
        yield Case(f"{name}, distributed optimizer, DP 2", 2, 2, OVERLAP, pieces, dtype="float32", adam=True)
        packs, halves = replace(rows, batch="packed uneven", micro_batches=2), replace(rows, micro_batches=2)
        yield Case(f"{name}, packed, one process", 1, 1, "", packs, halves)
        yield Case(f"{name}, packed, DP 2", 2, 2, "", replace(packs, micro_batches=1), rows)
        yield Case(f"{name}, packed, CP 2", 2, 1, CP, packs, halves, core=is_sqrt)
        extremes = replace(rows, batch="extremes")
        yield Case(f"{name}, ranks of text, vision, padding, all", 4, 4, "", extremes)
        balanced = (*SMAR, *balance)
        # Rows with the same number of loss tokens weigh the same, so that these two are the losses without the flag,
        # with every auxiliary loss at its usual scale.
        even, plain = Setting(flags=(*flags, *balance)), Setting(flags=balanced)
        yield Case(f"{name} of even rows as without it, TP 2 + SP", 2, 1, TP_SP, even, plain)
        pieces, plain = Setting(micro_batches=4, flags=flags), Setting(micro_batches=4)
        yield Case(f"{name} of even rows as without it, EP 2, 4 micro-batches", 2, 2, EP, pieces, plain)
    # The same losses by other means: a micro-batch for each row, and Megatron's mean over all tokens. Nothing but the
    # main loss may depend on the micro-batches here.
    without = PLAIN
    each = Setting(batch="no empty row", flags=(*without, "--loss-weighting", "sample"))
    one_by_one = Setting(batch="no empty row", micro_batches=ROWS, flags=without)
    for layout, replicas, flags in (("DP 2", 2, ""), ("CP 2", 1, CP)):
        name = f"sample weighting as a micro-batch for each row, {layout}"
        yield Case(name, 2, replicas, flags, each, one_by_one, core=layout == "DP 2", logs_its_loss=False)
    tokens = Setting(batch="uneven", flags=(*SMAR, "--loss-weighting", "token"))
    by_token = Setting(batch="uneven", flags=PER_TOKEN)
    yield Case("token weighting as per-token loss, EP 2", 2, 2, EP, tokens, by_token)
    yield Case("token weighting as per-token loss, CP 2", 2, 1, CP, tokens, by_token)


def _execution() -> Iterator[Case]:
    yield Case("all-gather dispatcher, EP 2", 2, 2, f"{EP} --moe-token-dispatcher-type allgather")
    yield Case("full recomputation, DP 2", 2, 2, RECOMPUTE_ALL, core=True)
    selective = "--recompute-granularity selective --recompute-modules"
    yield Case("selective recomputation of the MoE layer", 2, 2, f"{selective} moe")
    yield Case("selective recomputation of attention", 2, 2, f"{selective} core_attn")
    deep = Setting("four layers", micro_batches=4)
    yield Case("PP 2, full recomputation", 2, 1, f"{PP} {RECOMPUTE_ALL}", deep)
    yield Case("distributed optimizer, DP 2", 2, 2, "--use-distributed-optimizer", dtype="float32", adam=True)
    yield Case("distributed optimizer, overlapped, DP 2", 2, 2, OVERLAP, dtype="float32", adam=True)
    yield Case("distributed optimizer, overlapped, EP 2", 2, 2, f"{OVERLAP} {EP}", dtype="float32", adam=True)
    yield Case("float32, TP 2 x EP 2 x DP 2", 4, 2, f"{TP_SP} {EP}", dtype="float32")
    yield Case("bfloat16, EP 2", 2, 2, f"{EP} --bf16", dtype="bfloat16")


def _contents() -> Iterator[Case]:
    balanced = (*SMAR, "--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.1")
    other, same = Setting(batch="other padding", flags=balanced), Setting(flags=balanced)
    yield Case("what padding holds, TP 2 + SP", 2, 1, TP_SP, other, same)
    frozen = Setting(flags=("--modality-routing", "smar", "--freeze", "vision", "language"))
    yield Case("SMAR with a frozen language model, EP 2", 2, 2, EP, frozen)
    nothing_frozen = Setting(flags=("--modality-routing", "smar", "--freeze"))
    for name, layout, replicas in (("EP 2", EP, 2), ("TP 2 + SP", TP_SP, 1)):
        yield Case(f"nothing frozen, {name}", 2, replicas, layout, nothing_frozen)
    yield Case("nothing frozen, CP 2", 2, 1, CP, nothing_frozen)
    yield Case("nothing frozen, PP 2", 2, 1, PP, nothing_frozen)
    rising, half = (*SMAR, "--smar-warmup-iters", "2"), (*SMAR, "--smar-coeff", "0.25")
    yield Case(
        "warm-up, half of beta in the first of two steps, DP 2", 2, 2, "", Setting(flags=rising), Setting(flags=half)
    )
    late = Setting(flags=(*SMAR, "--smar-start-iter", "1"))
    yield Case("start step not reached, DP 2", 2, 2, "", late, Setting(flags=(*SMAR, "--smar-coeff", "0")))
    extremes = Setting(batch="extremes", flags=PER_TOKEN)
    yield Case("ranks of text, vision, padding, all", 4, 4, "", extremes)
    yield Case("ranks of text, vision, padding, all, EP 4", 4, 4, "--expert-model-parallel-size 4", extremes)
    for name, parts in FREEZES.items():
        routing = "none" if "language" in parts else "smar"
        setting = Setting(batch="no images", flags=("--modality-routing", routing, "--freeze", *parts))
        yield Case(f"no images, frozen: {name}", 2, 2, "", setting)
    for batch in ("no images", "mixed"):
        setting = Setting(batch=batch, flags=STAGE_1)
        yield Case(f"stage 1, {batch}, PP 2", 2, 1, PP, setting)
        yield Case(f"stage 1, {batch}, EP 2", 2, 2, EP, setting)
        yield Case(f"stage 1, {batch}, TP 2 + SP", 2, 1, TP_SP, setting)
        yield Case(f"stage 1, {batch}, CP 2", 2, 1, CP, setting)
        for name, layout, replicas in (("EP 2", EP, 2), ("PP 2", PP, 1)):
            case = f"stage 1, {batch}, {name}, distributed optimizer"
            yield Case(case, 2, replicas, f"{layout} {OVERLAP}", setting, dtype="float32", adam=True)


def _backbones() -> Iterator[Case]:
    for model in MODELS:
        if model not in ("mixtral", "four layers"):
            yield Case(f"{model}, EP 2", 2, 2, EP, Setting(model=model))
    yield Case("dense layers between, PP 2", 2, 1, PP, Setting(model="dense layers between"))
    yield Case("shared experts, TP 2 + SP", 2, 1, TP_SP, Setting("shared experts"))
    for model in ("parallel block", "norms per head", "norms over all heads", "latent attention"):
        core = model != "norms per head"  # these are Megatron's
        yield Case(f"{model}, TP 2 + SP", 2, 1, TP_SP, Setting(model), core=core)
        yield Case(f"{model}, PP 2", 2, 1, PP, Setting(model))
        yield Case(f"{model}, CP 2", 2, 1, CP, Setting(model))
        packs, separate = Setting(model, "packed", 2), Setting(model, micro_batches=2)
        yield Case(f"{model}, packed, TP 2 + SP", 2, 1, TP_SP, packs, separate)
    yield Case("parallel block, full recomputation, DP 2", 2, 2, RECOMPUTE_ALL, Setting("parallel block"))
    yield Case("without SMAR, EP 2", 2, 2, EP, Setting(flags=PLAIN))
    yield Case("without SMAR, CP 2", 2, 1, CP, Setting(flags=PLAIN))


def _strategies() -> Iterator[Case]:
    for name, flags in STRATEGIES.items():
        steps = 2 if {"smoes", "ernie"} & set(flags) else 1
        yield from _every_layout(name, Setting(flags=(*flags, "--freeze", "vision"), steps=steps))
    yield from _attention_scores()
    balance = ("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.1")
    hard = Setting(flags=(*STRATEGIES["hard routing"], "--freeze", "vision"))
    yield Case("hard routing, balance loss, TP 2 + SP", 2, 1, TP_SP, replace(hard, flags=(*hard.flags, *balance)))
    gates = Setting(flags=(*STRATEGIES["modality gates"], "--freeze", "vision", *balance))
    yield Case("modality gates, balance loss, TP 2 + SP", 2, 1, TP_SP, gates)
    biased = replace(hard, model="sigmoid scores with expert bias")
    yield Case("hard routing, sigmoid scores with expert bias, EP 2", 2, 2, EP, biased)
    split = ("--modality-routing", "layer_split", "--layer-split-layers", "2", "--freeze", "vision")
    scored = Setting("sigmoid scores with expert bias", flags=(*STRATEGIES["MoIIE"], "--freeze", "vision"))
    yield Case("MoIIE, sigmoid scores with expert bias, EP 2", 2, 2, EP, scored)
    yield Case("layer split, PP 2", 2, 1, PP, Setting("four layers", flags=split))


def _attention_scores() -> Iterator[Case]:
    """Yields what scores by attention depend on: the kind of attention, where they travel, what is recomputed."""
    flags = (*STRATEGIES["SMoES, attention scores"], "--freeze", "vision")
    scores, name = Setting(flags=flags, steps=2), "SMoES, attention scores"
    deep = replace(scores, model="four layers")
    for model in ("latent attention", "parallel block", "norms over all heads", "dense layers between"):
        yield Case(f"{name}, {model}, TP 2 + SP", 2, 1, TP_SP, replace(scores, model=model))
    yield Case(f"{name}, latent attention, PP 2", 2, 1, PP, replace(scores, model="latent attention"))
    yield Case(f"{name}, TP 2 x PP 2", 4, 1, f"{TP_SP} {PP}", deep)
    yield Case(f"{name}, TP 2 x CP 2", 4, 1, f"{TP_SP} {CP}", scores)
    yield Case(f"{name}, PP 2 x CP 2", 4, 1, f"{PP} {CP}", deep)
    yield Case(f"{name}, PP 2, 4 micro-batches", 2, 1, PP, replace(deep, micro_batches=4))
    yield Case(f"{name}, PP 2, full recomputation", 2, 1, f"{PP} {RECOMPUTE_ALL}", replace(deep, micro_batches=4))
    selective = "--recompute-granularity selective --recompute-modules"
    yield Case(f"{name}, recomputation of MoE and attention, EP 2", 2, 2, f"{EP} {selective} moe core_attn", scores)
    packs, separate = replace(scores, batch="packed", micro_batches=2), replace(scores, micro_batches=2)
    yield Case(f"{name}, packed, TP 2 x CP 2", 4, 1, f"{TP_SP} {CP}", packs, separate)
    # Two layers and one step: with more, rounding to bf16 changes which experts some tokens choose.
    one_step = replace(scores, steps=1)
    yield Case(f"{name}, bfloat16, PP 2", 2, 1, f"{PP} --bf16", one_step, dtype="bfloat16")
    kinds = replace(scores, batch="three modalities", flags=(*flags, "--image-modalities", "vision", "chart"))
    yield Case(f"{name}, three modalities, TP 2 + SP", 2, 1, TP_SP, kinds)
    for objective in ("kl", "none"):
        ablation = replace(scores, flags=(*flags, "--smoes-objective", objective, "--smoes-fixed-bins"))
        yield Case(f"{name}, objective {objective}, fixed bins, EP 2", 2, 2, EP, ablation)


def _every_layout(name: str, setting: Setting) -> Iterator[Case]:
    """Yields one case for each kind of parallelism and execution, of which one or two belong to the fast core."""
    yield Case(f"{name}, DP 2", 2, 2, "", setting)
    yield Case(f"{name}, EP 2", 2, 2, EP, setting, core=True)
    yield Case(f"{name}, TP 2 + SP", 2, 1, TP_SP, setting, core=name.startswith("SMoES, attention"))
    yield Case(f"{name}, PP 2", 2, 1, PP, setting)
    pipelined = replace(setting, model="four layers", micro_batches=4)
    yield Case(f"{name}, PP 2 interleaved", 2, 1, VIRTUAL, pipelined, dtype="float32")
    yield Case(f"{name}, CP 2", 2, 1, CP, setting)
    yield Case(f"{name}, EP 2, 4 micro-batches", 2, 2, EP, replace(setting, micro_batches=4))
    yield Case(f"{name}, full recomputation, DP 2", 2, 2, RECOMPUTE_ALL, setting)
    packs, separate = replace(setting, batch="packed", micro_batches=2), replace(setting, micro_batches=2)
    yield Case(f"{name}, packed, CP 2", 2, 1, CP, packs, separate)
    extremes = replace(setting, batch="extremes", flags=(*setting.flags, "--calculate-per-token-loss"))
    yield Case(f"{name}, ranks of text, vision, padding, all", 4, 4, "", extremes)


def _modalities() -> Iterator[Case]:
    """Yields text and two kinds of images."""
    three = Setting(batch="three modalities", flags=(*SMAR, "--image-modalities", "vision", "chart"))
    yield Case("three modalities, DP 2", 2, 2, "", three, core=True)
    yield Case("three modalities, EP 2", 2, 2, EP, three)
    yield Case("three modalities, TP 2 + SP", 2, 1, TP_SP, three)
    yield Case("three modalities, PP 2", 2, 1, PP, three)
    yield Case("three modalities, CP 2", 2, 1, CP, three)
    yield Case("three modalities, full recomputation, DP 2", 2, 2, RECOMPUTE_ALL, three)
    pipelined = replace(three, model="four layers", micro_batches=4)
    yield Case("three modalities, PP 2 interleaved", 2, 1, VIRTUAL, pipelined, dtype="float32")
    moiie = ("--modality-routing", "moiie", "--moiie-coeff", "0.5", "--num-experts", "12", "--freeze", "vision")
    kinds = ("--image-modalities", "vision", "chart")
    yield Case("three modalities, MoIIE, TP 2 + SP", 2, 1, TP_SP, replace(three, flags=(*moiie, *kinds)))
    hard = ("--modality-routing", "hard", "--num-experts", "8", "--freeze", "vision")
    parts = ("--hard-experts", "text=0-3", "vision=4,5", "chart=6,7", "--image-modalities", "vision", "chart")
    yield Case("three modalities, hard routing, EP 2", 2, 2, EP, replace(three, flags=(*hard, *parts)))


def _balanced_vision() -> Iterator[Case]:
    """Yields replicas that share the vision encoder's work; the reference is one process, which has nobody to share."""
    balanced, smar, packs = "--balance-vision", Setting(), Setting(batch="packed", micro_batches=1)
    yield Case("balanced vision, DP 2", 2, 2, balanced, smar, core=True)
    yield Case("balanced vision, DP 2, stage 1", 2, 2, balanced, Setting(flags=STAGE_1))
    two = replace(smar, micro_batches=2)
    yield Case("balanced vision, EP 2 x DP 2, 2 micro-batches", 4, 4, f"{balanced} {EP}", two)
    yield Case("balanced vision, TP 2 x DP 2", 4, 2, f"{balanced} {TP_SP}", smar)
    yield Case("balanced vision, CP 2 x DP 2", 4, 2, f"{balanced} {CP}", smar)
    yield Case("balanced vision, PP 2 x DP 2", 4, 2, f"{balanced} {PP}", two)
    pipelined = replace(smar, model="four layers", micro_batches=4)
    yield Case("balanced vision, PP 2 interleaved x DP 2", 4, 2, f"{balanced} {VIRTUAL}", pipelined, dtype="float32")
    yield Case("balanced vision, packed, DP 2", 2, 2, balanced, packs, smar)
    extremes = Setting(batch="extremes", flags=PER_TOKEN)
    yield Case("balanced vision, ranks of text, vision, padding, all", 4, 4, balanced, extremes)


CASES = {case.name: case for case in cases()}
