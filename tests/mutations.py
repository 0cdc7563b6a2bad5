# SPDX-License-Identifier: Apache-2.0
"""Puts faults into the routing and the exchange of tiles, one line at a time, and checks that the tests notice them.

    python tests/mutations.py [--only NAME] [--write docs/routing.md]

Each mutation is applied to a copy of the committed and changed files, in which the named tests must then fail. The
table is printed, and with --write it replaces the text between the document's `mutations` marks. A mutation takes about
half a minute.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- mutations: written by tests/mutations.py -->", "<!-- end of mutations -->")


def exactness(layout: str) -> str:
    """Returns the id of one layout's test."""
    return f"tests/distributed/test_exactness.py::test_layout_equals_one_process_with_the_whole_batch[{layout}]"


@dataclass(frozen=True)
class Mutation:
    """A fault and the tests that must notice it.

    Attributes:
        name: Description of the fault.
        file: File that is changed.
        old: Code that is replaced; it occurs once in the file.
        new: Faulty code.
        tests: Tests of which at least one must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "drop the data-parallel scaling",
        "megatron_smar/routing/step.py",
        "return replicas if is_global else 1",
        "return 1",
        (exactness("DP 2"),),
    ),
    Mutation(
        "reduce over the wrong group",
        "megatron_smar/routing/router.py",
        "self.tp_dp_cp_group if self.is_global else self.tp_cp_group",
        "self.tp_cp_group",
        (exactness("DP 2"),),
    ),
    Mutation(
        "forget sequence parallelism's scattering of the ids",
        "megatron_smar/model/vlm.py",
        "modality_ids.chunk(group.size(), dim=1)[group.rank()]",
        "modality_ids.chunk(group.size(), dim=1)[0]",
        (exactness("TP 2 + SP"),),
    ),
    Mutation(
        "leave padding in",
        "megatron_smar/routing/modalities.py",
        "return ids if padding_mask is None else ids.masked_fill(padding_mask, PADDING)",
        "return ids",
        ("tests/unit/routing", "tests/unit/training"),
    ),
    Mutation(
        "detach R",
        "megatron_smar/routing/statistics.py",
        "return None, gradient",
        "return None, torch.zeros_like(gradient)",
        ("tests/distributed/test_exactness.py::test_the_reference_itself_has_smar_in_it",),
    ),
    Mutation(
        "take context-parallel shares for contiguous",
        "megatron_smar/model/context_parallel.py",
        "torch.cat([chunks[:context_parallel_size], chunks.flip(0)[:context_parallel_size]], dim=1)",
        "torch.arange(first, first + length).view(context_parallel_size, -1)",
        (exactness("CP 2"),),
    ),
    Mutation(
        "let the last sample of a pack see the ones before it",
        "megatron_smar/training/batch.py",
        "ends = F.pad(lengths.cumsum(0), (1, 0)).int()",
        "ends = F.pad(torch.stack([lengths[0], lengths[1:].sum()]).cumsum(0), (1, 0)).int()",
        (exactness("packed, DP 2"),),
    ),
    Mutation(
        "forget that gradients are divided by tokens",
        "megatron_smar/routing/step.py",
        "return self.tokens / (1 if is_global else replicas)",
        "return 1 if is_global else 1 / replicas",
        (exactness("per-token loss as without it, DP 2"),),
    ),
    Mutation(
        "weigh by the loss tokens of a pack",
        "megatron_smar/data/loss_weighting.py",
        "if lengths is None:",
        "if lengths is not False:",
        ("tests/unit/data/test_loss_weighting.py",),
    ),
    Mutation(
        "leave the division of a weighted loss by replicas to Megatron",
        "megatron_smar/training/loss.py",
        "return total * ranks / divisor",
        "return total / divisor",
        (exactness("sqrt weighting, EP 2, 4 micro-batches"),),
    ),
    Mutation(
        "let the modality bias out of sequence parallelism's sum",
        "megatron_smar/routing/modality_bias.py",
        "self.bias.sequence_parallel = sequence_parallel",
        "self.bias.sequence_parallel = False",
        (exactness("TP 2 + SP"),),
    ),
    Mutation(
        "let a modality choose the experts of the next",
        "megatron_smar/routing/strategies/hard.py",
        "table[modality, numbers] = True",
        "table[modality - 1, numbers] = True",
        ("tests/unit/routing/strategies/test_hard.py",),
    ),
    Mutation(
        "route padding by the last modality's gate",
        "megatron_smar/routing/strategies/modality_gates.py",
        "logits = torch.where(modality_mask[..., modality, None], every[..., modality, :], logits)",
        "logits = torch.where(modality_mask[..., :modality].any(-1, keepdim=True), logits, every[..., modality, :])",
        ("tests/unit/routing/strategies/test_modality_gates.py",),
    ),
    Mutation(
        "let a modality's gate out of sequence parallelism's sum",
        "megatron_smar/routing/strategies/modality_gates.py",
        "parameter.sequence_parallel = layer.sequence_parallel",
        "parameter.sequence_parallel = False",
        (exactness("modality gates, TP 2 + SP"),),
    ),
    Mutation(
        "count all experts in the balance loss of each of MoIIE's gates",
        "megatron_smar/routing/strategies/moiie.py",
        "per_gate = routing.allowed.sum(dim=-1) * (load",
        "per_gate = routing.allowed.shape[-1] * (load",
        ("tests/unit/routing/strategies/test_moiie.py",),
    ),
    Mutation(
        "start a new run's further gates as the model built them, not as the gate that is loaded",
        "megatron_smar/routing/router.py",
        "starts.get(name, own[name])",
        "own[name]",
        ("tests/unit/routing/strategies/test_modality_gates.py",),
    ),
    Mutation(
        "let the bias for balance lift an expert that is not allowed",
        "megatron_smar/routing/router.py",
        "bias = torch.where(forbidden, -torch.inf, 0.0 if bias is None else bias)",
        "pass",
        ("tests/unit/routing/strategies/test_hard.py",),
    ),
    Mutation(
        "forget that the smoothed distribution is also under the logarithm",
        "megatron_smar/routing/closed_form.py",
        "torch.addcdiv(of_logs, of_smoothed, smoothed)",
        "of_logs",
        ("tests/unit/routing/test_closed_form.py",),
    ),
    Mutation(
        "compare a modality that is absent",
        "megatron_smar/routing/closed_form.py",
        "torch.dot(tokens.clamp(max=1), places)",
        "torch.dot(torch.ones_like(tokens), places)",
        ("tests/unit/routing/test_closed_form.py",),
    ),
    Mutation(
        "add the bias on the choice to the weights too",
        "megatron_smar/routing/choice.py",
        "return scores.gather(1, chosen), chosen",
        "return (compared + self._bias).gather(1, chosen), chosen",
        ("tests/unit/routing/strategies/test_ernie.py",),
    ),
    Mutation(
        "add the bias on the choice to logits",
        "megatron_smar/routing/choice.py",
        "if self._scores_are_logits:",
        "if False:",
        ("tests/unit/routing/strategies/test_ernie.py",),
    ),
    Mutation(
        "raise the bias of the experts with most tokens",
        "megatron_smar/routing/strategies/ernie.py",
        "(mean - self.load).sign()",
        "(self.load - mean).sign()",
        ("tests/unit/routing/strategies/test_ernie.py",),
    ),
    Mutation(
        "compare loads across modalities",
        "megatron_smar/routing/strategies/ernie.py",
        "mean = self.load.sum(dim=1, keepdim=True) / self.own.sum(dim=1, keepdim=True)",
        "mean = self.load.sum() / self.own.sum()",
        ("tests/unit/routing/strategies/test_ernie.py",),
    ),
    Mutation(
        "forget the loads of a step's other micro-batches",
        "megatron_smar/routing/strategies/ernie.py",
        "self.load += routing.statistics.counts",
        "self.load.copy_(routing.statistics.counts)",
        ("tests/unit/routing/strategies/test_ernie.py",),
    ),
    Mutation(
        "leave the bias on the choice out of the checkpoint",
        "megatron_smar/routing/strategies/ernie.py",
        'self.register_buffer("bias", torch.zeros(own.shape))',
        'self.register_buffer("bias", torch.zeros(own.shape), persistent=False)',
        ("tests/unit/routing/strategies/test_ernie.py",),
    ),
    Mutation(
        "count a loss of weights once for each rank",
        "megatron_smar/routing/router.py",
        "return self._attach(output, own, True, self.tp_dp_cp_group.size())",
        "return self._attach(output, own, True, 1)",
        (exactness("ERNIE, EP 2"),),
    ),
    Mutation(
        "balance over all tokens instead of each modality's",
        "megatron_smar/routing/strategies/balance.py",
        "number = tokens.clamp(min=1).unsqueeze(1)",
        "number = tokens.sum().clamp(min=1)",
        ("tests/unit/routing/strategies/test_modality_balance.py",),
    ),
    Mutation(
        "take a token's label for the next modality's",
        "megatron_smar/routing/strategies/label_ce.py",
        "(losses * tokens.modality_mask).sum()",
        "(losses * tokens.modality_mask.roll(1, dims=1)).sum()",
        ("tests/unit/routing/strategies/test_label_ce.py",),
    ),
    Mutation(
        "leave a strategy's own sums unreduced",
        "megatron_smar/routing/statistics.py",
        "_with_gradient(total, self._sums[name])",
        "self._sums[name]",
        ("tests/unit/routing/strategies/test_base.py",),
    ),
    Mutation(
        "round soft scores to bf16 between pipeline stages",
        "megatron_smar/model/score_transport.py",
        "scores.contiguous().view(activations.dtype)",
        "scores.to(activations.dtype).to(scores.dtype).contiguous().view(activations.dtype)",
        ("tests/unit/model/test_score_layer.py",),
    ),
    Mutation(
        "let padding have a soft score",
        "megatron_smar/routing/soft_scores.py",
        "other, own) * (scores.sum(dim=-1, keepdim=True) > 0)",
        "other, own)",
        ("tests/unit/routing/test_soft_scores.py",),
    ),
    Mutation(
        "leave the tokens of a sample on other ranks out",
        "megatron_smar/routing/samples.py",
        "dist.all_reduce(total, group=self.group)",
        "dist.barrier(group=self.group)",
        (exactness("SMoES, hard scores, TP 2 + SP"),),
    ),
    Mutation(
        "give each rank only a part of the gradient of a sample that it shares",
        "megatron_smar/routing/samples.py",
        "return value.detach() / ranks + (value - value.detach())",
        "return value / ranks",
        (exactness("SMoES, hard scores, TP 2 + SP"),),
    ),
    Mutation(
        "average soft scores over this rank's attention heads only",
        "megatron_smar/model/layers/score_layer.py",
        "mean = reduce_scatter_to_sequence_parallel_region(mean, group=group) / group.size()",
        "mean = mean.chunk(group.size())[group.rank()]",
        (exactness("SMoES, attention scores, TP 2 + SP"),),
    ),
    Mutation(
        "mix up the features that other replicas have computed with a replica's own",
        "megatron_smar/model/vision_balance.py",
        "return torch.cat([own, returned])",
        "return torch.cat([returned, own])",
        (exactness("balanced vision, DP 2"),),
    ),
    Mutation(
        "pull distances inside SMAR's band to its lower end",
        "megatron_smar/routing/strategies/smar.py",
        "outside = (distance - distance.clamp(d_min, d_max))",
        "outside = (distance - distance.clamp(d_min, d_min))",
        ("tests/unit/routing/test_closed_form.py",),
    ),
    Mutation(
        "begin SMAR's warm-up a step late",
        "megatron_smar/routing/strategies/smar.py",
        "steps = iteration - self.start_iter + 1",
        "steps = iteration - self.start_iter",
        ("tests/unit/routing/strategies/test_smar.py",),
    ),
    Mutation(
        "leave hard routing out of the last of the lower layers",
        "megatron_smar/routing/strategies/layer_split.py",
        "if layer <= self.layers else None",
        "if layer < self.layers else None",
        ("tests/unit/routing/strategies/test_layer_split.py",),
    ),
    Mutation(
        "sort experts into bins by their share of vision",
        "megatron_smar/routing/bins.py",
        "loads[0] / total.where",
        "loads[1] / total.where",
        ("tests/unit/routing/test_bins.py",),
    ),
    Mutation(
        "form SMoES's bins in every step",
        "megatron_smar/routing/strategies/smoes.py",
        "due = self.steps % self.config.rebin_interval == 0",
        "due = self.steps > 0",
        ("tests/unit/routing/strategies/test_smoes.py",),
    ),
    Mutation(
        "forget the loads of a step's other micro-batches in SMoES",
        "megatron_smar/routing/strategies/smoes.py",
        "self.counts += routing.statistics.counts",
        "self.counts = routing.statistics.counts.clone()",
        ("tests/unit/routing/strategies/test_smoes.py",),
    ),
    Mutation(
        "give a sample information about a modality that it does not have",
        "megatron_smar/routing/strategies/smoes.py",
        "sums.unflatten(1, weighted.shape[1:]) * (numbers > 0).unsqueeze(2)",
        "sums.unflatten(1, weighted.shape[1:])",
        ("tests/unit/routing/strategies/test_smoes.py",),
    ),
    Mutation(
        "sum the gradient of gathered hidden states over tensor-parallel ranks twice",
        "megatron_smar/model/masked_loss.py",
        "tensor_parallel_output_grad=False",
        "tensor_parallel_output_grad=True",
        (exactness("TP 2 + SP"),),
    ),
    Mutation(
        "let sequences of a pack attend to each other",
        "megatron_smar/model/layers/local_attention.py",
        "parts = zip(*(x.split(lengths) for x",
        "parts = zip(*(x.split(sum(lengths)) for x",
        (exactness("packed, TP 2 + SP"),),
    ),
    Mutation(
        "let a token of a context-parallel share of a pack attend to the next one",
        "megatron_smar/model/layers/local_attention.py",
        "visible = own.unsqueeze(1) >= torch.arange(first, first + len(k), device=own.device)",
        "visible = own.unsqueeze(1) >= torch.arange(first, first + len(k), device=own.device) - 1",
        (exactness("packed, CP 2"),),
    ),
)


def survives(mutation: Mutation) -> str | None:
    """Returns None if a test failed, else what happened instead."""
    output, code = run_tests(mutation.tests, mutation)
    if code is None:
        return output
    if code == 0:
        return "all tests passed"
    return None if code == 1 and " failed" in output else f"the tests did not run:\n{output[-2000:]}"


def run_tests(tests: Sequence[str], mutation: Mutation | None) -> tuple[str, int | None]:
    """Runs tests in a copy with the mutation; returns pytest's output and exit code (None: it could not be applied)."""
    with tempfile.TemporaryDirectory() as place:
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            if (ROOT / name).is_file():
                (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(place) / name)
        if mutation:
            file = Path(place) / mutation.file
            text = file.read_text()
            if text.count(mutation.old) != 1:
                return f"{mutation.file} has the line {text.count(mutation.old)} times: update the mutation", None
            file.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "--matrix", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    return done.stdout, done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[mutation.name for mutation in MUTATIONS])
    parser.add_argument("--write", type=Path, help="document to write the table into")
    options = parser.parse_args()
    if options.only and options.write:
        parser.error("--write needs all mutations: leave out --only")
    named = [mutation for mutation in MUTATIONS if options.only in (None, mutation.name)]
    print("without a fault ...", end=" ", flush=True)
    output, code = run_tests(list(dict.fromkeys(test for mutation in named for test in mutation.tests)), None)
    if code != 0:
        sys.exit(f"the tests fail without a fault:\n{output[-2000:]}")
    print("all tests passed", flush=True)
    rows, failures = [], []
    for mutation in named:
        print(f"{mutation.name} ...", end=" ", flush=True)
        why = survives(mutation)
        print(why or "noticed", flush=True)
        failures += [mutation.name] if why else []
        tests = ", ".join(f"`{test.rsplit('::', 1)[-1].rsplit('batch', 1)[-1]}`" for test in mutation.tests)
        rows.append(f"| {mutation.name} | {tests} | {'**not noticed**' if why else 'noticed'} |")
    table = "\n".join(["| fault | tests run | result |", "|---|---|---|", *rows])
    print(table)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        start, end = (text.index(mark) for mark in MARKS)
        text = f"{text[: start + len(MARKS[0])]}\n{table}\n{text[end:]}"
        options.write.write_text(text, encoding="utf-8")
    sys.exit(f"not noticed: {', '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
