# SPDX-License-Identifier: Apache-2.0
"""The demo: trains a small vision-language MoE on text, then on images, and evaluates it before and after stage 2.

    python examples/emoji_tiny/run.py [--routing smar] [--set FLAG=VALUE ...] [--output runs/demo]
    python examples/emoji_tiny/run.py --compare [--seeds 1 2 3 4 5]

Every step trains or evaluates with the same programs as a large run (`pretrain_vlm.py`, `tools/evaluate.py`,
`tools/data/prepare.py`). Steps whose results are still valid are skipped; an interrupted stage resumes from its last
checkpoint. Stage 2 under another routing strategy than SMAR starts from the same checkpoint, and its results are in a
folder beside --output, such as runs/demo-hard. With --compare, stage 2 is also trained without the strategy, and both
are repeated with the seeds of --seeds, each time with another order of the data; the paired differences are shown with
their intervals.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # this process only parses flags and reads results

from demo_content import content
from demo_report import print_table, write_report
from paired import MOST_FLIPS
from stages import Demo, VariantRun, time_left
from steps import StepError
from variants import DEFAULT, Variant, find_variant, variants

SEEDS = (1, 2, 3, 4, 5)  # of --compare: routings differ by less than a single pair of runs does by chance (docs/study)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options of both of the demo's programs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/sources"), help="sources (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps on little data, to try the programs")
    parser.add_argument(
        "--any-code",
        action="store_true",
        help="keep results that another version of the code made from the same settings and data; they are named",
    )
    return parser


def run(demo: Demo, variant: Variant, others: list[Variant], repeated: list[tuple[Variant, Variant]]) -> Path:
    """Runs all steps of a variant and writes its report.

    Args:
        demo: The shared steps.
        variant: The variant.
        others: Variants to compare it with.
        repeated: For each further seed, the variant and what it is compared with.

    Returns:
        The report's page.
    """
    begin = time.monotonic()
    demo.prepare()
    runs = [VariantRun(demo, each) for each in (variant, *others, *itertools.chain(*repeated))]
    for number, each in enumerate(runs):
        if len(runs) > 1:
            left = sum(not later.is_evaluated for later in runs[number:])
            print(f"\n{each.variant.label}: {number + 1} of {len(runs)}{time_left(runs[:number], left)}", flush=True)
        each.run()
    print(f"steps done in {time.monotonic() - begin:.0f} s", flush=True)
    compared = 1 + len(others)
    pairs = list(zip(runs[compared::2], runs[compared + 1 :: 2], strict=True))
    report = content(demo, runs[0], runs[1:compared], pairs)
    page = write_report(report, runs[0].folder)[1]
    print_table(report)
    return page


def main() -> None:
    """Runs the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="results (default: %(default)s)")
    parser.add_argument(
        "--routing", default=DEFAULT, help=f"stage 2's routing: {', '.join(variants())} (default: %(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FLAG=VALUE", help="further flags of stage 2, such as smar-coeff=0.1"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also train stage 2 without the strategy, on several seeds, and compare"
    )
    parser.add_argument(
        "--seeds",
        nargs="*",
        type=int,
        metavar="N",
        default=SEEDS,
        help="with --compare: repeat both with these seeds; without any, one run of each (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.seeds is not SEEDS and not options.compare:
        parser.error("--seeds repeats a comparison: give --compare too")
    seeds = list(dict.fromkeys(options.seeds))
    if len(seeds) > MOST_FLIPS:
        parser.error(f"--seeds has {len(seeds)}; the exact test takes at most {MOST_FLIPS}")
    os.chdir(ROOT)
    try:
        variant = find_variant(options.routing, options.set)
        others = [find_variant("none")] if options.compare else []
        if variant in others:
            raise ValueError("--compare compares with --routing none: give another routing.")
        changes = [[*options.set, f"seed={seed}"] for seed in seeds if options.compare]
        repeated = [(find_variant(options.routing, each), find_variant("none", each[-1:])) for each in changes]
        page = run(Demo(options.output, options.cache, options.quick, options.any_code), variant, others, repeated)
    except (StepError, ValueError) as error:
        sys.exit(f"demo: {error}")
    print(f"\nreport: {page}")


if __name__ == "__main__":
    main()
