# SPDX-License-Identifier: Apache-2.0
"""The keys of a record: which are read, which may be left aside, and which hold what must not get lost unseen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from megatron_smar.data.rejects import SampleError
from megatron_smar.modalities import VISION

RECORD_KEYS = frozenset({"conversations", "text", "image", "images", "image_modality", "system"})
TURN_KEYS = frozenset({"from", "value"})

# Where a record comes from and how large things are: nothing that a model could learn.
_ABOUT = frozenset(
    "id ids idx index uid uuid key sample_id conversation_id question_id source sources data_source dataset "
    "dataset_name data_type origin model model_name generator task task_type type category categories domain topic "
    "tag tags language lang split subset license url link doi author date timestamp created version width height "
    "widths heights width_list height_list size resolution length len num_tokens token_count num_turns num_rounds "
    "score scores rating quality difficulty hash md5 sha256 meta metadata comment note annotator".split()
)
# Other forms of a conversation, and pairs of which only one is to be learned.
_OTHER_FORMS = frozenset("messages history chosen rejected rejected_response".split())
_SYSTEM = frozenset("system sys".split())
_PICTURES = frozenset(
    "image images img imgs picture pictures photo photos pic pics pixel pixels thumbnail visual visuals".split()
)
_MEDIA = _PICTURES | frozenset(
    "video videos frame frames clip clips movie movies audio audios speech sound sounds voice wav waveform music "
    "media attachment attachments tool tools function functions plugin plugins api apis depth pointcloud".split()
)
# `image_size`, `num_images`: words that make a key speak about a picture, where it does not hold one.
_ABOUT_MEDIA = frozenset(
    "id ids idx index size sizes width height widths heights source count num number length hash md5 sha256 license "
    "ratio quality type format mode resolution resolutions shape dims category label score meta metadata".split()
)
_FIRST_ABOUT_MEDIA = frozenset("num n has is with count nb total max min".split())
# What is said about a picture, in words: not read, but reported.
_SAID_OF_MEDIA = frozenset("caption captions description descriptions title text ocr".split())
_MEDIA_FILE = re.compile(
    r"\.(jpe?g|png|webp|gif|bmp|tiff?|jp2|avif|heic|mp4|mkv|avi|mov|webm|wav|mp3|flac|ogg|m4a)$", re.I
)
# A turn's say in the loss; a turn that is learned as usual says nothing else than these values.
_LOSS = frozenset("loss loss_mask loss_weight weight train learn trainable".split())
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")


def is_empty(value: Any) -> bool:
    """Return whether a column holds nothing: null, no text, no number, or a list or object of nothing else."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value != value  # NaN is what pandas writes for nothing


def check_keys(record: Mapping[str, Any], known: Collection[str] = RECORD_KEYS, where: str = "") -> list[str]:
    """Return the keys of a record, or of a turn, that hold something, are not read, and are not known to be harmless.

    Args:
        record: The record, or one of its turns.
        known: The keys that are read.
        where: What goes before a key in messages and in what is returned.

    Raises:
        SampleError: ``unsupported_key``: a key holds pictures, videos, sounds, tools, system text or turns that are
            not read, and would be lost without a word.
    """
    unread = []
    for key, value in record.items():
        if key in known or key in _ABOUT or is_empty(value):
            continue
        name = where + (key if key.isprintable() else ascii(key))
        hint = _loss_hint(value) if known is TURN_KEYS and key.lower() in _LOSS else _hint(key, value, record)
        if hint:
            raise SampleError("unsupported_key", f"`{name}` is not read, and what it holds would be lost: {hint}")
        if hint is None:
            unread.append(name)
    return unread


def _loss_hint(value: Any) -> str:
    return "" if value in (1, True) else "leave it out where each answer is to be learned"


def _hint(key: str, value: Any, record: Mapping[str, Any]) -> str | None:
    """Say what to do about a key that holds something to learn from; empty if it is harmless, None if unknown."""
    words = [word.lower() for word in _WORDS.findall(key)]
    speaks_of_media = not _MEDIA.isdisjoint(words)
    if speaks_of_media and words[-1] in _SAID_OF_MEDIA:
        return None
    about = len(words) > 1 and (words[-1] in _ABOUT_MEDIA or words[0] in _FIRST_ABOUT_MEDIA)
    if speaks_of_media and (about or isinstance(value, bool | int | float)):
        return ""
    if not _PICTURES.isdisjoint(words):
        return "pictures are read from the record's `image` or `images`"
    if speaks_of_media:
        return "leave it out, or empty, where the record is to be learned without it"
    if _names_file(value) and not image_paths(record):
        return "pictures are read from the record's `image` or `images`"
    if not _SYSTEM.isdisjoint(words):
        return "system text is read from the record's `system`, or from a first turn from system"
    if key.lower() in _OTHER_FORMS:
        return "turns are read from `conversations`, with `from` and `value`"
    return None


def _names_file(value: Any) -> bool:
    """Return whether a value is the name of a picture, a video or a sound, or a list of such names."""
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and _MEDIA_FILE.search(name) for name in names)


def image_paths(record: Mapping[str, Any]) -> list[str]:
    """Return the paths of a record's pictures, from `image` or `images`; an empty one is none.

    Raises:
        SampleError: ``bad_record``.
    """
    found = {key: _paths(key, record.get(key)) for key in ("image", "images") if not is_empty(record.get(key))}
    if len(found) == 2 and found["image"] != found["images"]:
        raise SampleError("bad_record", "`image` and `images` name different pictures: leave one of them out")
    return next(iter(found.values()), [])


def image_modalities(record: Mapping[str, Any], num_images: int) -> list[str]:
    """Return the kind of each of a record's images, from `image_modality`: a name, or one for each image.

    Raises:
        SampleError: ``bad_record``.
    """
    value = record.get("image_modality")
    if isinstance(value, list):
        names: list[Any] = value
    else:
        names = [VISION if is_empty(value) else value] * num_images
    if not all(isinstance(name, str) for name in names) or len(names) != num_images:
        images = counted(num_images, "image")
        raise SampleError(
            "bad_record",
            f"`image_modality` is {value!r} and there are {images}: give a name, or a list with one for each image",
        )
    return names


def _paths(key: str, value: Any) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path.strip() for path in paths):
        raise SampleError("bad_record", f"`{key}` is neither a path nor a list of paths")
    return paths


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
