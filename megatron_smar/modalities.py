# SPDX-License-Identifier: Apache-2.0
"""The table of a run's modalities: id, name, placeholder token. Everything that counts or names modalities reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

TEXT, VISION = "text", "vision"


class Modality(NamedTuple):
    """One modality.

    Attributes:
        id: Its row in every [M, ...] tensor; text is 0.
        name: Its name in flags, records, logs and checkpoints.
        placeholder: Token of the vocabulary that stands for one vision token of it; None for text.
    """

    id: int
    name: str
    placeholder: str | None


@dataclass(frozen=True)
class Modalities:
    """Text and the kinds of images of a run (--image-modalities), each a modality with routing statistics of its own.

    All kinds of images go through the same vision encoder and connector. The placeholder of `vision` is InternVL's
    `<IMG_CONTEXT>`, that of another kind `<NAME_CONTEXT>`.

    Attributes:
        images: Names of the kinds of images, in the order of their ids from 1; the first is `vision`.
    """

    images: tuple[str, ...] = (VISION,)

    def __post_init__(self) -> None:
        given = f"--image-modalities {' '.join(self.images)}"
        if self.images[:1] != (VISION,):
            raise ValueError(f"{given} must begin with {VISION}, the kind of all images that do not name another.")
        for name in self.images:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == TEXT:
                raise ValueError(
                    f"{given}: {name!r} cannot name a kind of images; give one of lower-case letters, digits and _."
                )
        if len(set(self.images)) < len(self.images):
            raise ValueError(f"{given} names a kind of images twice; give each once.")

    def __len__(self) -> int:
        """M."""
        return 1 + len(self.images)

    def __iter__(self) -> Iterator[Modality]:
        """The modalities in the order of their ids."""
        yield Modality(0, TEXT, None)
        for number, name in enumerate(self.images, start=1):
            yield Modality(number, name, "<IMG_CONTEXT>" if name == VISION else f"<{name.upper()}_CONTEXT>")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all modalities, by id."""
        return (TEXT, *self.images)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Placeholder tokens of the kinds of images, by id from 1."""
        return tuple(modality.placeholder for modality in self if modality.placeholder is not None)
