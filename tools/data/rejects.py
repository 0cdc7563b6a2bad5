# SPDX-License-Identifier: Apache-2.0
"""Table of the samples that a training run skipped, by reason."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar.data.rejects import format_rejects, read_reasons


def main() -> None:
    """Prints the table of a run's rejected samples, one for each split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="the run's --rejects-dir")
    args = parser.parse_args()
    if not args.directory.is_dir():
        parser.error(f"{args.directory} is no folder: give a run's --rejects-dir (it is made with the first reject).")
    reasons = read_reasons(args.directory)
    for split in sorted({split for split, _ in reasons}):
        mine = {key: reason for (of, key), reason in reasons.items() if of == split}
        print(f"{split}: {len(mine)} samples skipped")
        print(format_rejects(Counter(mine.values()), {reason: key for key, reason in reversed(mine.items())}))
    if not reasons:
        print("No sample was skipped.")


if __name__ == "__main__":
    main()
