# SPDX-License-Identifier: Apache-2.0
"""LLaVA's format, in which most mixtures are published.

A JSON list (or JSON lines) of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`. `image` is
a path below the image root, a list of such paths, or absent for text; `images` is accepted instead of it, and `system`
is read as a first turn from system. Published in this format:

- LLaVA-1.5-558k and LLaVA-mix-665k: `blip_laion_cc_sbu_558k.json` (liuhaotian/LLaVA-Pretrain) and
  `llava_v1_5_mix665k.json` (liuhaotian/LLaVA-Instruct-150K), described in github.com/haotian-liu/LLaVA,
  docs/Finetune_Custom_Data.md and README.md.
- The files that MoE-LLaVA published for its training (github.com/PKU-YuanGroup/MoE-LLaVA, docs/TRAIN.md):
  `llava_image_.json`, `llava_image_tune_.json`, `svit_tune_157k.json`, `lvis_tune_220k_.json`,
  `lrv_tune_331k.json`, `la_tune_256k.json` and `nlp_tune.json` (text only). A `video` is refused.
- SVIT's `format/llava-v1.5` and LVIS-Instruct4V's `lvis_instruct4v_220k.json` (X2FD/LVIS-Instruct4V).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_smar.data.conversations import IMAGE_TAG, ROLES, has_turns
from megatron_smar.data.fields import TURN_KEYS, check_keys, counted, image_paths, is_empty
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources.records import ImageFile, SourceRecord


def convert(entry: Any) -> Iterator[SourceRecord]:
    """Yields the one record of an entry of LLaVA's format.

    Raises:
        SampleError: `bad_record`, `unsupported_key`, `image_without_answer` or `image_in_answer`.
    """
    if not isinstance(entry, dict):
        yield SourceRecord(entry)
        return
    paths = image_paths(entry)
    unread = check_keys(entry)
    turns = entry.get("conversations")
    if has_turns(entry) and not is_empty(entry.get("text")):
        unread.append("text")
    if isinstance(turns, list):
        unread += [key for turn in turns if isinstance(turn, dict) for key in check_keys(turn, TURN_KEYS, "turn.")]
    trimmed = _without_loose_ends(turns)
    data = entry if trimmed is None else entry | {"conversations": trimmed}
    images = tuple(ImageFile((path,)) for path in paths)
    left_out = 0 if trimmed is None else len(entry["conversations"]) - len(trimmed)
    yield SourceRecord(data, images, left_out, tuple(dict.fromkeys(unread)))


def convert_lvis(entry: Any) -> Iterator[SourceRecord]:
    """Yields the one record of an entry of LVIS-Instruct4V.

    Its paths are `coco/train2017/...`; the image root may also be the COCO folder itself.

    Raises:
        SampleError: As `convert`.
    """
    for record in convert(entry):
        paths = [image.paths[0] for image in record.images if isinstance(image, ImageFile)]
        images = tuple(ImageFile((path, path.removeprefix("coco/"))) for path in paths)
        yield dataclasses.replace(record, images=images)


def _without_loose_ends(turns: Any) -> list[Any] | None:
    """Removes an answer without a question at the start and a question without an answer at the end.

    The ShareGPT part of LLaVA-mix has such conversations. LLaVA's train.py drops a first turn that is not human, and
    masks a last question, which has no answer to learn.

    Returns:
        The remaining turns, or None if there is nothing to remove.

    Raises:
        SampleError: `image_without_answer` or `image_in_answer`: an image would be removed with such a turn.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    speakers = [turn.get("from") for turn in turns]
    if not all(isinstance(speaker, str) for speaker in speakers):
        return None
    roles = [ROLES.get(speaker) for speaker in speakers]
    start = 1 if roles[:1] == ["assistant"] else 0
    end = len(turns) - (1 if roles[-1:] == ["user"] else 0)
    if not 2 <= end - start < len(turns):
        return None
    for turn in [*turns[:start], *turns[end:]]:
        text = turn.get("value")
        if isinstance(text, str) and (number := text.count(IMAGE_TAG)):
            if turn is turns[0]:
                raise SampleError("image_in_answer", f"turn 1 has an {IMAGE_TAG} tag, but is not the user's")
            raise SampleError(
                "image_without_answer",
                f"the last question, which has no answer to learn, shows {counted(number, 'image')}",
            )
    return turns[start:end]
