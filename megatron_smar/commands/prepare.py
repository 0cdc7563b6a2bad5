# SPDX-License-Identifier: Apache-2.0
r"""Turn published datasets, or records of your own, into the shards that training reads.

Records are a JSON list or JSON lines. Each has `conversations` (turns with `from` human/gpt/system and `value`) with
one `<image>` tag per image and `image` or `images` (a path or a list of paths; none for text), or a plain `text`:

  {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                       {"from": "gpt", "value": "A cat."}]}
  {"id": "2", "text": "Plain text to learn from."}

That is `--format llava`; the others are read as their authors published them (docs/data.md).

The same records and images always give the same shards. A run that was interrupted, in any way, continues where it
stopped when the same command is run again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_smar.data.preparation import TooManyRejectsError, prepare
from megatron_smar.data.sources import FORMATS
from megatron_smar.data.sources.report import format_report


def main() -> None:
    """Runs `prepare` as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, help="folder to create; give it as --data-path when training")
    add("--train", required=True, nargs="+", metavar="FILE", help="training records")
    add("--valid", default=[], nargs="+", metavar="FILE", help="validation records")
    add("--valid-fraction", type=float, default=0.0, metavar="F", help="share of --train to validate on (default: 0)")
    add("--format", dest="source_format", default="llava", choices=FORMATS, help="the records' format (default: llava)")
    add("--image-root", default=".", metavar="DIR", help="where the records' image paths start (default: here)")
    add("--image-files", default=[], nargs="+", metavar="FILE", help="images by id, for --format mimic_it: LA.json")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="records per shard (default: 1000)")
    add("--max-skip-ratio", type=float, default=0.1, metavar="R", help="largest share of unusable records (0.1)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace the shards in --output")
    args = parser.parse_args()
    tqdm.monitor_interval = 0  # its thread must not exist when processes fork
    try:
        reports = prepare(**vars(args))
    except TooManyRejectsError as error:
        print(format_report(error.reports))
        sys.exit(f"{parser.prog}: {error}")
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command continues from here.")
    print(format_report(reports))
    if any(report.rejected for report in reports.values()):
        print(f"Left-out records, with reasons: {Path(args.output) / 'rejects.jsonl'}")


if __name__ == "__main__":
    main()
