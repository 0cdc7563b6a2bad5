# SPDX-License-Identifier: Apache-2.0
"""The import contract: which package of megatron_smar may import which, and the table of it in docs/architecture.md.

    python -m tests.layout            checks imports and table; part of `make lint`
    python -m tests.layout --write    writes the table

A package imports only from floors below its own: no import runs upwards, none within a floor, so there are no circles.
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

# From the lowest floor to the highest; the packages of one floor do not import each other.
FLOORS: list[dict[str, str]] = [
    {
        "compatibility": "refuses, when `megatron_smar` is imported, packages that Megatron would fail with",
        "modalities": "the table of a run's modalities: id, name, placeholder token",
        "runtime": "which environment this is, its defaults of flags, adaptations of torch and Megatron: each a named "
        "function with its reason and where that holds",
    },
    {
        "routing": "the papers' mathematics: modalities, statistics, MRD; the router and the MoE layer; one file per "
        "routing strategy in `strategies/`",
        "data": "readers of published formats (`sources/`), conversations, images, tiling, packing (`csrc/`), blends, "
        "loader and its state",
        "huggingface": "modelling code of the exports that transformers has no class for; written beside their weights",
    },
    {"model": "vision tower, connector, the vision-language model; `layers/` has the decoder's layers and their specs"},
    {"monitoring": "what is watched of the routing during a run: tracker, load, heat maps, the warning of collapse"},
    {"config": "flags, the configs they become, the checks that no config can make by itself, the sentences of errors"},
    {
        "checkpoint": "the formats, torch_dist and safetensors; what a checkpoint holds, whether it fits",
    },
    {
        "training": "what Megatron's `pretrain()` is given: providers, batch, loss, resuming, the start",
        "conversion": "Hugging Face <-> torch_dist by one table per architecture (`architectures/`), upcycling",
    },
    {
        "evaluation": "held-out scores, generation, agreement with Hugging Face's model (`verify`), chat",
        "report": "figures and the HTML page of any run, from its folder",
    },
    {"commands": "the programs; `tools/` and the console entry points start them"},
]
FLOOR_OF = {name: floor for floor, packages in enumerate(FLOORS) for name in packages}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Each import of ours in a file: its line, and the package or module below `megatron_smar` that it is from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise ValueError(f"{path}:{node.lineno}: a relative import; write the whole name.")
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == PACKAGE and rest.partition(".")[0] in FLOOR_OF:
                yield node.lineno, rest.partition(".")[0]


def violations() -> list[str]:
    """A sentence for each import that the order forbids, and for each package that has no floor."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        own = path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
        if own == "__init__":  # checks the environment, and imports nothing else
            continue
        if own not in FLOOR_OF:
            found.append(f"{path.relative_to(ROOT)}: {own} has no floor; give it one in tests/layout.py.")
            continue
        found += [
            f"{path.relative_to(ROOT)}:{line}: {own} imports {other}, which is not below it; move what they share down."
            for line, other in imports(path)
            if other != own and FLOOR_OF[other] >= FLOOR_OF[own]
        ]
    return found


def imported_by(package: str) -> list[str]:
    """The packages that one imports, from the lowest floor up."""
    place = ROOT / PACKAGE / package
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    others = {other for path in files for _, other in imports(path)} - {package}
    return [name for name in FLOOR_OF if name in others]


def table() -> str:
    """The Markdown table of packages, the highest floor first."""
    rows = ["| package | what | imports of ours |", "|---|---|---|"]
    for packages in reversed(FLOORS):
        for name, what in packages.items():
            rows.append(f"| `{name}` | {what} | {', '.join(imported_by(name)) or 'none'} |")
    return "\n".join(rows)


def main() -> None:
    """Checks, or writes the table; status 1 where the contract is broken."""
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
