# SPDX-License-Identifier: Apache-2.0
"""Print a table of the samples that a training run skipped, by reason."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar.data.rejects import format_rejects, read_reasons


def main() -> None:
    """Prints a table of the run's rejected samples for each split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="the run's --rejects-dir")
    args = parser.parse_args()
    if not args.directory.is_dir():
        parser.error(
            f"{args.directory} is not a folder: give a run's --rejects-dir (it is created with the first reject)."
        )
    reasons = read_reasons(args.directory)
    for split in sorted({split for split, _ in reasons}):
        of_split = {key: reason for (name, key), reason in reasons.items() if name == split}
        print(f"{split}: {len(of_split)} samples skipped")
        print(format_rejects(Counter(of_split.values()), {reason: key for key, reason in reversed(of_split.items())}))
    if not reasons:
        print("No sample was skipped.")


if __name__ == "__main__":
    main()
