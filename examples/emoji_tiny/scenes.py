# SPDX-License-Identifier: Apache-2.0
"""The demo's images: scenes composed of OpenMoji artwork, with captions, and questions with exactly known answers.

A scene is a 2 x 2 grid on a coloured background; each corner has one of 24 objects or nothing. A hash of a scene's
content decides whether it is held out, so that training never sees a held-out combination, whatever the exact positions
of its objects. Files in the output folder, in LLaVA's format, with image paths relative to it:

    images/train/*.png, images/held_out/*.png
    captions.json           stage 1: one caption per scene
    instructions.json       stage 2: question-answer turns, some about two images
    vqa_held_out.json       {"id", "image", "question", "answer", "kind", "chance"}: `image` is a list, `question` the
                            full human turn with its `<image>` tags, `chance` the score of the best constant answer
    summary.json            `ScenesSummary`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sources import DEFAULT_CACHE, OPENMOJI, SourceError, members
from tqdm import tqdm

IMAGE_SIZE = 64
CELL = IMAGE_SIZE // 2
SPRITE = 28
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
NOTHING = "nothing"

# Name of each object in the demo, and Unicode name of its emoji. Chosen by eye: no two look alike at 28 px.
OBJECTS = {
    "cat": "CAT FACE",
    "dog": "DOG FACE",
    "turtle": "TURTLE",
    "fish": "FISH",
    "butterfly": "BUTTERFLY",
    "spider": "SPIDER",
    "pig": "PIG",
    "elephant": "ELEPHANT",
    "penguin": "PENGUIN",
    "crab": "CRAB",
    "apple": "RED APPLE",
    "banana": "BANANA",
    "lemon": "LEMON",
    "carrot": "CARROT",
    "mushroom": "MUSHROOM",
    "pizza": "SLICE OF PIZZA",
    "avocado": "AVOCADO",
    "car": "AUTOMOBILE",
    "rocket": "ROCKET",
    "house": "HOUSE BUILDING",
    "umbrella": "UMBRELLA",
    "key": "KEY",
    "clock": "ALARM CLOCK",
    "guitar": "GUITAR",
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "red": (226, 106, 100),
    "blue": (120, 160, 235),
    "green": (120, 195, 125),
    "yellow": (245, 222, 110),
    "purple": (178, 130, 205),
}
# Number of objects of each kind in a scene -> relative frequency, such that no answer to "how many" dominates.
PATTERNS: dict[tuple[int, ...], int] = {
    (1,): 10,
    (1, 1): 6,
    (1, 1, 1): 8,
    (1, 1, 1, 1): 12,
    (2,): 12,
    (2, 1): 12,
    (2, 1, 1): 12,
    (2, 2): 10,
    (3,): 10,
    (3, 1): 13,
    (4,): 14,
}

Sprites = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Scene:
    """Content of an image.

    Attributes:
        background: Name of the background's colour.
        cells: Object, or None, in each of `CORNERS`.
        offsets: Position of each object in its cell, (x, y) from 0 to `CELL - SPRITE`.
    """

    background: str
    cells: tuple[str | None, ...]
    offsets: tuple[tuple[int, int], ...]

    @property
    def objects(self) -> list[str]:
        """The objects in reading order, each as often as it occurs."""
        return [name for name in self.cells if name]

    @property
    def has_one_kind(self) -> bool:
        """Whether all objects are of the same kind."""
        return len(set(self.objects)) == 1

    @property
    def held_out(self) -> bool:
        """Whether the scene belongs to the held-out tenth; offsets have no influence."""
        content = "|".join([self.background, *(name or "" for name in self.cells)])
        return hashlib.sha256(content.encode()).digest()[0] < 26


@dataclass(frozen=True)
class Question:
    """A question of a given kind and its only correct answer, a single word."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class ScenesConfig:
    """Amounts of data to make.

    Attributes:
        train_scenes: Number of training images; each gives a caption and an instruction record.
        held_out_items: Number of questions on held-out scenes; the kinds alternate.
        two_image_percent: Percentage of the instruction records that ask about two images.
        seed: Seed of all random choices.
    """

    train_scenes: int = 6000
    held_out_items: int = 600
    two_image_percent: int = 6
    seed: int = 1234

    def __post_init__(self) -> None:
        """Refuses invalid values."""
        for name in ("train_scenes", "held_out_items"):
            if getattr(self, name) < 20:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 20 are needed, so that every kind occurs.")
        if not 1 <= self.two_image_percent <= 100:
            raise ValueError(f"two_image_percent is {self.two_image_percent}: must be between 1 and 100.")


@dataclass(frozen=True)
class ScenesSummary:
    """Measured sizes; `chance` is the share of the most common answer to training questions of each kind."""

    train_images: int
    held_out_images: int
    image_bytes: int
    captions: int
    instructions: int
    turns: int
    two_image_records: int
    held_out_items: int
    chance: dict[str, float]


def load_sprites(font: Path, size: int = SPRITE) -> Sprites:
    """Renders every object once.

    Returns:
        Name -> [size, size, 4] float32: colours in 0..255 multiplied by the opacity, and the opacity in 0..1.

    Raises:
        SourceError: The font has no glyph for an object.
    """
    drawer = ImageFont.truetype(str(font), 128, layout_engine=ImageFont.Layout.BASIC)
    sprites = {}
    for name, unicode_name in OBJECTS.items():
        canvas = Image.new("RGBA", (256, 256))
        character = unicodedata.lookup(unicode_name)
        ImageDraw.Draw(canvas).text((64, 64), character, font=drawer, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise SourceError(f"The font {font} has no picture of {unicode_name}: fetch the demo's sources again.")
        side = max(box[2] - box[0], box[3] - box[1])
        square = Image.new("RGBA", (side, side))
        square.paste(canvas.crop(box), ((side - box[2] + box[0]) // 2, (side - box[3] + box[1]) // 2))
        pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32)
        opacity = pixels[..., 3:] / 255
        sprites[name] = np.concatenate([pixels[..., :3] * opacity, opacity], axis=-1)
    return sprites


def sample_scene(rng: random.Random) -> Scene:
    """Samples a scene: numbers of objects per kind, the kinds, their positions and the background."""
    pattern = rng.choices(list(PATTERNS), weights=list(PATTERNS.values()))[0]
    kinds = rng.sample(list(OBJECTS), len(pattern))
    cells: list[str | None] = [kind for kind, number in zip(kinds, pattern, strict=True) for _ in range(number)]
    cells += [None] * (len(CORNERS) - len(cells))
    rng.shuffle(cells)
    room = CELL - SPRITE
    offsets = tuple((rng.randint(0, room), rng.randint(0, room)) for _ in CORNERS)
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(cells), offsets)


def sample_scenes(rng: random.Random, held_out: bool) -> Iterator[Scene]:
    """Samples scenes endlessly: only held-out scenes, or only others."""
    while True:
        scene = sample_scene(rng)
        if scene.held_out == held_out:
            yield scene


def render(scene: Scene, sprites: Sprites) -> NDArray[np.uint8]:
    """Renders a scene, [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for cell, (name, (x, y)) in enumerate(zip(scene.cells, scene.offsets, strict=True)):
        if name:
            top, left = cell // 2 * CELL + y, cell % 2 * CELL + x
            region = canvas[top : top + SPRITE, left : left + SPRITE]
            sprite = sprites[name]
            region *= 1 - sprite[..., 3:]
            region += sprite[..., :3]
    return canvas.round().clip(0, 255).astype(np.uint8)


def with_article(noun: str) -> str:
    """Returns the noun with its article: 'a cat', 'an owl'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Returns the plural of a regular noun (and of 'fish')."""
    if noun == "fish":
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def caption(scene: Scene) -> str:
    """Returns one sentence with the objects in reading order, their positions and the background."""
    pairs = zip(CORNERS, scene.cells, strict=True)
    places = [f"{with_article(name)} at the {corner}" for corner, name in pairs if name]
    listed = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
    return f"{listed}, on a {scene.background} background.".capitalize()


def ask_corner(scene: Scene, rng: random.Random) -> Question:
    """Asks what is in a corner; in one of ten cases about an empty corner, if there is one."""
    empty = [corner for corner, name in enumerate(scene.cells) if not name]
    full = [corner for corner, name in enumerate(scene.cells) if name]
    corner = rng.choice(empty if empty and rng.random() < 0.1 else full)
    return Question("corner", f"What is at the {CORNERS[corner]}?", scene.cells[corner] or NOTHING)


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """Asks for the number of objects of a kind that is in the scene."""
    name = rng.choice(scene.objects)
    return Question("count", f"How many {plural(name)} are there?", NUMBERS[scene.objects.count(name)])


def ask_colour(scene: Scene, rng: random.Random) -> Question:
    """Asks for the background's colour."""
    return Question("colour", "Which colour is the background?", scene.background)


def ask_presence(scene: Scene, rng: random.Random) -> Question:
    """Asks whether an object is in the scene; the answer is yes in half of the cases."""
    if rng.random() < 0.5:
        return Question("presence", f"Is there {with_article(rng.choice(scene.objects))}?", "yes")
    absent = rng.choice([name for name in OBJECTS if name not in scene.cells])
    return Question("presence", f"Is there {with_article(absent)}?", "no")


def ask_pair(first: Scene, second: Scene, rng: random.Random) -> Question | None:
    """Asks which of two images has an object; None if both have the same objects."""
    answer = rng.choice(("first", "second"))
    shown, other = (first, second) if answer == "first" else (second, first)
    names = [name for name in shown.objects if name not in other.cells]
    return Question("pair", f"In which picture is the {rng.choice(names)}?", answer) if names else None


def ask_object(scene: Scene, rng: random.Random) -> Question | None:
    """Asks what is in the image, if all objects are of the same kind; None otherwise."""
    return Question("object", "What is in the picture?", scene.objects[0]) if scene.has_one_kind else None


ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "object": ask_object,
    "corner": ask_corner,
    "count": ask_count,
    "colour": ask_colour,
    "presence": ask_presence,
}


def human_turn(text: str, images: int) -> str:
    """Returns the human's first turn: one `<image>` tag per line, then the text."""
    return "<image>\n" * images + text


def caption_question(scene: Scene) -> Question:
    """Returns stage 1's question about an image, with its caption as the answer."""
    return Question("caption", "Describe the picture.", caption(scene))


def scene_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Returns different questions about a scene: all kinds that apply, shuffled; half of the time also its caption."""
    kinds = rng.sample([*ASK, "corner"], len(ASK) + 1)
    questions = [question for kind in kinds if (question := ASK[kind](scene, rng))]
    if rng.random() < 0.5:
        questions.append(caption_question(scene))
    return list({question.text: question for question in questions}.values())


def pair_questions(first: Scene, second: Scene, rng: random.Random) -> list[Question]:
    """Returns up to three different questions about two images; none if both have the same objects."""
    questions = (ask_pair(first, second, rng) for _ in range(rng.randint(1, 3)))
    return list({question.text: question for question in questions if question}.values())


def record(key: str, images: Sequence[str], questions: Sequence[Question]) -> dict[str, object]:
    """Returns a conversation about images, in LLaVA's format."""
    turns: list[dict[str, str]] = []
    for number, question in enumerate(questions):
        text = question.text if number else human_turn(question.text, len(images))
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return {"id": key, "image": images[0] if len(images) == 1 else list(images), "conversations": turns}


def prepare(cache: Path, output: Path, config: ScenesConfig | None = None) -> ScenesSummary:
    """Makes all images and records (see the module's docstring).

    Args:
        cache: Folder where `sources.fetch` stored the sources.
        output: Folder to write to.
        config: Amounts of data; the defaults if None.

    Returns:
        The summary, which is also written to the folder.

    Raises:
        SourceError: The sources have not been fetched.
    """
    config = config or ScenesConfig()
    rng = random.Random(config.seed)
    sprites = load_sprites(members(OPENMOJI, cache)[0])
    train = _write_images(sample_scenes(rng, held_out=False), config.train_scenes, sprites, output, "train")
    asked = Counter[tuple[str, str]]()
    captions = [record(f"caption-{Path(path).stem}", [path], [caption_question(scene)]) for path, scene in train]
    instructions = []
    for number, (path, scene) in enumerate(train):
        images, questions = [path], scene_questions(scene, rng)
        if rng.randrange(100) < config.two_image_percent:
            other_path, other = train[rng.randrange(len(train))]
            pair = pair_questions(scene, other, rng)
            images, questions = ([path, other_path], pair) if pair else (images, questions)
        asked.update((question.kind, question.answer) for question in questions if question.kind != "caption")
        instructions.append(record(f"scene-{number:06d}", images, questions))
    chance = chance_by_kind(asked)
    held_out = sample_scenes(rng, held_out=True)
    held_images = _write_images(held_out, config.held_out_items, sprites, output, "held_out")
    items = held_out_items(held_images, chance, rng)
    pictures = [*train, *held_images]
    summary = ScenesSummary(
        train_images=len(train),
        held_out_images=len(held_images),
        image_bytes=sum((output / path).stat().st_size for path, _ in pictures),
        captions=len(captions),
        instructions=len(instructions),
        turns=sum(asked.values()),
        two_image_records=sum(isinstance(entry["image"], list) for entry in instructions),
        held_out_items=len(items),
        chance=chance,
    )
    for name, value in (("captions", captions), ("instructions", instructions), ("vqa_held_out", items)):
        (output / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    (output / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


def _write_images(
    source: Iterator[Scene], count: int, sprites: Sprites, output: Path, name: str
) -> list[tuple[str, Scene]]:
    """Writes scenes as PNG files; returns (path relative to the output, scene) of each."""
    (output / "images" / name).mkdir(parents=True, exist_ok=True)
    written = []
    for number in tqdm(range(count), desc=f"{name} pictures", unit="picture", mininterval=2):
        scene = next(source)
        path = f"images/{name}/{number:06d}.png"
        Image.fromarray(render(scene, sprites)).save(output / path, compress_level=6)
        written.append((path, scene))
    return written


def chance_by_kind(asked: Counter[tuple[str, str]]) -> dict[str, float]:
    """Returns the share of the most common answer of each kind of question, from (kind, answer) counts."""
    shares: dict[str, float] = {}
    for kind in sorted({kind for kind, _ in asked}):
        numbers = [number for (other, _), number in asked.items() if other == kind]
        shares[kind] = max(numbers) / sum(numbers)
    return shares


def held_out_items(
    pictures: Sequence[tuple[str, Scene]], chance: dict[str, float], rng: random.Random
) -> list[dict[str, object]]:
    """Makes one question per image; a pair also uses the next image.

    The kinds alternate, so that the first n questions are balanced.
    """
    kinds = [kind for kind in (*ASK, "pair") if kind in chance]
    one_kind = [(path, scene) for path, scene in pictures if scene.has_one_kind]
    items: list[dict[str, object]] = []
    for number, (path, scene) in enumerate(pictures):
        kind = kinds[number % len(kinds)]
        if kind == "pair":
            other_path, other = pictures[(number + 1) % len(pictures)]
            images, question = [path, other_path], ask_pair(scene, other, rng)
        else:
            if kind == "object":
                path, scene = one_kind[number % len(one_kind)]
            images, question = [path], ASK[kind](scene, rng)
        if question:
            item = {"id": f"vqa-{number:06d}", "image": images, "question": human_turn(question.text, len(images))}
            items.append(item | {"answer": question.answer, "kind": kind, "chance": chance[kind]})
    return items


def main() -> None:
    """Runs the command line."""
    defaults = ScenesConfig()
    parser = argparse.ArgumentParser(description="Compose the demo's pictures, captions and questions.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="fetched sources (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo/scenes"), help="(default: %(default)s)")
    for name in ("train_scenes", "held_out_items", "two_image_percent", "seed"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help="(default: %(default)s)")
    arguments = vars(parser.parse_args())
    cache, output = arguments.pop("cache"), arguments.pop("output")
    started = time.monotonic()
    try:
        summary = prepare(cache, output, ScenesConfig(**arguments))
    except (SourceError, ValueError) as error:
        sys.exit(str(error))
    for name, value in asdict(summary).items():
        print(f"{name:18} {value}")
    print(f"scenes in {output} after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
