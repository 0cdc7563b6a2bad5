# SPDX-License-Identifier: Apache-2.0
"""LLaVA's format, in which most mixtures are published.

A JSON list (or JSON lines) of ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``. ``image`` is
a path below the image root, a list of them, or absent for text. It is followed by:

- LLaVA-1.5-558k and LLaVA-mix-665k: ``blip_laion_cc_sbu_558k.json`` (liuhaotian/LLaVA-Pretrain) and
  ``llava_v1_5_mix665k.json`` (liuhaotian/LLaVA-Instruct-150K), described in github.com/haotian-liu/LLaVA,
  docs/Finetune_Custom_Data.md and README.md.
- What MoE-LLaVA published for its own training (github.com/PKU-YuanGroup/MoE-LLaVA, docs/TRAIN.md):
  ``llava_image_.json``, ``llava_image_tune_.json``, ``svit_tune_157k.json``, ``lvis_tune_220k_.json``,
  ``lrv_tune_331k.json``, ``la_tune_256k.json`` and ``nlp_tune.json`` (text only). A ``video`` is not supported.
- SVIT's ``format/llava-v1.5`` and LVIS-Instruct4V's ``lvis_instruct4v_220k.json`` (X2FD/LVIS-Instruct4V).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_smar.data.conversations import ROLES
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources.records import ImageFile, SourceRecord


def convert(entry: Any) -> Iterator[SourceRecord]:
    """Yield the one record of an entry of LLaVA's format.

    Raises:
        SampleError: ``bad_record`` or ``unsupported_video``.
    """
    if not isinstance(entry, dict):
        yield SourceRecord(entry)
        return
    if "video" in entry:
        raise SampleError("unsupported_video", "the record has a `video`")
    trimmed = _without_loose_ends(entry.get("conversations"))
    data = entry if trimmed is None else entry | {"conversations": trimmed}
    images = tuple(ImageFile((path,)) for path in _image_paths(entry))
    yield SourceRecord(data, images, 0 if trimmed is None else len(entry["conversations"]) - len(trimmed))


def convert_lvis(entry: Any) -> Iterator[SourceRecord]:
    """Yield the one record of an entry of LVIS-Instruct4V.

    Its paths are ``coco/train2017/...``; a COCO folder as image root will do too.

    Raises:
        SampleError: As `convert`.
    """
    for record in convert(entry):
        paths = [image.paths[0] for image in record.images if isinstance(image, ImageFile)]
        images = tuple(ImageFile((path, path.removeprefix("coco/"))) for path in paths)
        yield SourceRecord(record.data, images, record.trimmed)


def _image_paths(entry: dict[str, Any]) -> list[str]:
    paths = entry.get("image")
    paths = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise SampleError("bad_record", "`image` is neither a path nor a list of paths")
    return paths


def _without_loose_ends(turns: Any) -> list[Any] | None:
    """Return the turns without an answer that nothing asked for and a question without an answer; None if all is well.

    LLaVA-mix's ShareGPT part has such conversations. LLaVA's train.py leaves out a first turn that is not human, and
    masks a last question, which has nothing to learn behind it.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    speakers = [turn.get("from") for turn in turns]
    if not all(isinstance(speaker, str) for speaker in speakers):
        return None
    roles = [ROLES.get(speaker) for speaker in speakers]
    start = 1 if roles[:1] == ["assistant"] else 0
    end = len(turns) - (1 if roles[-1:] == ["user"] else 0)
    return turns[start:end] if 2 <= end - start < len(turns) else None
