# SPDX-License-Identifier: Apache-2.0
"""The import contract: which package of megatron_smar may import which, and the table of it in docs/architecture.md.

    python -m tests.layout            checks imports and table; part of `make lint`
    python -m tests.layout --write    writes the table

A package imports only from levels below its own. No import goes to a higher level or within a level, so there are no
import cycles.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_smar"
DOCUMENT = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- written by python -m tests.layout --write -->", "<!-- end of the table -->"

# From the lowest level to the highest; packages of the same level do not import each other.
LEVELS: list[dict[str, str]] = [
    {"credentials": "refuses passwords and tokens in flags and addresses, and takes them out of messages"},
    {
        "compatibility": "refuses packages that Megatron would fail with, when `megatron_smar` is imported",
        "launch": "SLURM: a job as an sbatch file, checks of its nodes (`preflight/`), its attempts, the first error "
        "of many logs",
        "modalities": "the table of a run's modalities: id, name, placeholder token",
        "planning": "what a model costs, from a plain description of its shape",
        "runtime": "the environment (CPU or GPU), its defaults of flags, adaptations of torch and Megatron: each a "
        "named function with its reason and where the reason holds",
    },
    {
        "routing": "the papers' mathematics: modalities, statistics, MRD; the router and the MoE layer; one file per "
        "routing strategy in `strategies/`",
        "data": "readers of published formats (`sources/`), conversations, images, tiling, packing (`csrc/`), blends, "
        "the loader and its state",
        "reliability": "what a run does when something fails: trusted checkpoints, hangs, steps that are not finite",
        "huggingface": "modeling code of the exports that transformers has no class for; saved next to their weights",
    },
    {"model": "vision tower, connector, the vision-language model; `layers/` has the decoder's layers and their specs"},
    {"monitoring": "monitoring of the routing during a run: tracker, load, heat maps, the collapse warning"},
    {"config": "flags, the configs built from them, checks that involve more than one config, error messages"},
    {
        "checkpoint": "the formats torch_dist and safetensors; a checkpoint's content, and whether it fits a model",
    },
    {
        "training": "what is passed to Megatron's `pretrain()`: providers, batch, loss; initialization, resuming",
        "conversion": "Hugging Face <-> torch_dist with one table per architecture (`architectures/`), upcycling",
        "placement": "which expert is on which expert-parallel rank: plans, moving experts in a checkpoint, the "
        "dispatch they cause",
    },
    {
        "evaluation": "held-out scores, generation, agreement with Hugging Face's model (`verify`), chat",
        "report": "figures and the HTML page of a run, or of several that are compared, from their folders",
    },
    {"commands": "the programs, started by `tools/` and the console entry points"},
]
LEVEL_OF = {name: level for level, packages in enumerate(LEVELS) for name in packages}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields each import from this project in a file: its line, and the package or module below `megatron_smar`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise ValueError(f"{path}:{node.lineno}: a relative import; write the full name.")
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == PACKAGE and rest.partition(".")[0] in LEVEL_OF:
                yield node.lineno, rest.partition(".")[0]


def violations() -> list[str]:
    """Returns a sentence for each import that the order forbids, and for each package that has no level."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        own = path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
        if own == "__init__":  # it checks the environment and imports nothing else
            continue
        if own not in LEVEL_OF:
            found.append(f"{path.relative_to(ROOT)}: {own} has no level; give it one in tests/layout.py.")
            continue
        found += [
            f"{path.relative_to(ROOT)}:{line}: {own} imports {other}, which is not below it; "
            "move what they share to a lower level."
            for line, other in imports(path)
            if other != own and LEVEL_OF[other] >= LEVEL_OF[own]
        ]
    return found


def imported_by(package: str) -> list[str]:
    """Returns the packages that a package imports, from the lowest level up."""
    place = ROOT / PACKAGE / package
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    others = {other for path in files for _, other in imports(path)} - {package}
    return [name for name in LEVEL_OF if name in others]


def table() -> str:
    """Returns the Markdown table of packages, the highest level first."""
    rows = ["| package | content | imports |", "|---|---|---|"]
    for packages in reversed(LEVELS):
        for name, what in packages.items():
            rows.append(f"| `{name}` | {what} | {', '.join(imported_by(name)) or 'none'} |")
    return "\n".join(rows)


def main() -> None:
    """Checks the imports and the table, or writes the table; status 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/architecture.md")
    options = parser.parse_args()
    found = violations()
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"
    if options.write:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif text != DOCUMENT.read_text(encoding="utf-8"):
        found.append("docs/architecture.md: its table of packages is out of date; run python -m tests.layout --write.")
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
