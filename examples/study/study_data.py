# SPDX-License-Identifier: Apache-2.0
"""The data of the study: the demo's, with more held out, and the held-out part in two halves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grid import SPLIT_OF
from stages import Demo


class Data(Demo):
    """The demo's data and vision encoder, with more held out, and the held-out part in two halves."""

    def __init__(self, output: Path, cache: Path, options: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(output, cache, any_code=True)
        self._options = options

    def added(self, step: str) -> dict[str, Any]:
        """Returns the grid's options of a step's program."""
        return dict(self._options.get(step, {}))

    def prepare(self) -> None:
        """Makes all that runs share."""
        self.prepare_data()
        self.pretrain_vision()
        self.step("splits", code="", inputs=("corpus", "scenes")).run(self._split)

    def _split(self) -> None:
        corpus, scenes = self.output / "corpus", self.output / "scenes"
        lines = (corpus / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        items = json.loads((scenes / "vqa_held_out.json").read_text(encoding="utf-8"))
        texts, questions = split_texts([json.loads(line) for line in lines]), split_questions(items)
        for name in SPLIT_OF.values():
            for file, records in ((f"{name}_texts.json", texts[name]), (f"{name}_questions.json", questions[name])):
                content = json.dumps(records, ensure_ascii=False, indent=0)
                (self.output / "splits" / file).write_text(content, encoding="utf-8")


def split_texts(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Splits held-out passages by document, whose name is a hash, so that no document is on both sides."""
    sides: dict[str, list[Mapping[str, Any]]] = {name: [] for name in SPLIT_OF.values()}
    for record in records:
        sides[list(sides)[int(record["document"], 16) % 2]].append(record)
    return sides


def split_questions(items: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Splits held-out questions by picture; a question about a picture of each side is left out."""
    pictures = sorted({picture for item in items for picture in item["image"]})
    half = set(pictures[: len(pictures) // 2])
    validation, test = SPLIT_OF.values()
    return {
        validation: [item for item in items if half.issuperset(item["image"])],
        test: [item for item in items if half.isdisjoint(item["image"])],
    }
