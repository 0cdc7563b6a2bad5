# SPDX-License-Identifier: Apache-2.0
"""Broken samples, from a real archive to tokens and tiles: each is used correctly or skipped with its reason."""

import contextlib
import dataclasses
import io
import json
import random
import re
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.cbook import get_sample_data
from megatron.core.tokenizers import MegatronTokenizer
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from PIL import Image

from megatron_smar.data import (
    ConversationTaskEncoder,
    DataConfig,
    EnergonIterator,
    ImageConfig,
    SampleError,
    build_train_loader,
    build_valid_loader,
)
from megatron_smar.data.batch import EncodedSample
from megatron_smar.data.rejects import DataError, RejectLog
from megatron_smar.data.task_encoder import RawSample
from megatron_smar.data.tiling import ImageProcessor
from megatron_smar.data.tokens import TextEncoder

from .conftest import picture, talk

Parts = dict[str, bytes]
REASONS = set(
    "bad_image bad_record empty_conversation image_count_mismatch image_in_answer image_token_in_text image_too_large "
    "invalid_unicode not_utf8 null_character role_order special_token_in_text text_changed too_long unsafe_path "
    "unsupported_key".split()
)
TOKENS_PER_TILE = 2
GRACE = (Path(get_sample_data("grace_hopper.jpg", asfileobj=False))).read_bytes()
LOGO = (Path(get_sample_data("logo2.png", asfileobj=False))).read_bytes()


def chat(*texts: str, **changes: Any) -> bytes:
    return json.dumps({"id": "x", "conversations": talk(*texts)} | changes).encode()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(stream := io.BytesIO(), format=kind, **options)
    return stream.getvalue()


def one_image(data: bytes, name: str = "0.png") -> Parts:
    return {"json": chat("<image>\nWhat?", "A thing."), name: data}


def text(record: bytes) -> Parts:
    return {"json": record}


def exif_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)


def bomb() -> bytes:
    """A small PNG whose header gives 60000 x 60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    good = picture()
    return good[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + good[33:]


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
TURNS = '"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]'
WHAT = "[INST] <image>\nWhat? [/INST] A thing."
HI = "[INST] Hi [/INST] Yes"
# Kind of sample -> (its parts, the expected outcome: the reason why it is skipped, or its text).
SAMPLES: dict[str, tuple[Parts, str]] = {
    # Damaged images.
    "truncated jpeg": (one_image(GRACE[: len(GRACE) // 2], "0.jpg"), "bad_image"),
    "truncated png": (one_image(LOGO[: len(LOGO) // 2]), "bad_image"),
    "zero bytes": (one_image(b""), "bad_image"),
    "no picture at all": (one_image(b"<html>404</html>"), "bad_image"),
    "decompression bomb": (one_image(bomb()), "image_too_large"),
    # Unusual images.
    "jpeg": (one_image(GRACE, "0.jpg"), WHAT),
    "wrong extension": (one_image(LOGO, "0.jpg"), WHAT),
    "no extension": (one_image(LOGO, "0"), WHAT),
    "cmyk": (one_image(saved(Image.new("CMYK", (20, 20)), "JPEG"), "0.jpg"), WHAT),
    "16 bit": (one_image(saved(Image.new("I;16", (20, 20), 30000), "PNG")), WHAT),
    "palette": (one_image(saved(Image.new("P", (20, 20)), "PNG")), WHAT),
    "alpha": (one_image(saved(Image.new("RGBA", (20, 20), (255, 0, 0, 100)), "PNG")), WHAT),
    "turned by exif": (one_image(exif_turned(), "0.jpg"), WHAT),
    "animated": (one_image(animation(), "0.gif"), WHAT),
    "1 x 1": (one_image(picture(size=(1, 1))), WHAT),
    "1 x 10000": (one_image(picture(size=(1, 10000))), WHAT),
    # Images and tags.
    "missing image": (text(chat("<image>\nWhat?", "A thing.")), "image_count_mismatch"),
    "one tag too many": ({**one_image(LOGO), "json": chat("<image><image> Hi", "Yes")}, "image_count_mismatch"),
    "one tag too few": ({**one_image(LOGO), "json": chat("Hi", "Yes")}, "image_count_mismatch"),
    "tag in an answer": ({**one_image(LOGO), "json": chat("Hi", "<image>")}, "image_in_answer"),
    "gap in the numbers": ({"json": chat("<image>", "A"), "1.png": LOGO}, "bad_record"),
    "picture without a number": ({"json": chat("<image>", "A"), "png": LOGO}, "bad_record"),
    "two pictures of one number": (one_image(LOGO) | {"0.jpg": GRACE}, "bad_record"),
    "no record": ({"0.png": LOGO}, "bad_record"),
    # Records that are not a conversation.
    "empty conversation": (text(chat()), "empty_conversation"),
    "empty answer": (text(chat("Hi", " \n")), "empty_conversation"),
    "empty text": (text(b'{"text": ""}'), "empty_conversation"),
    "a number for a text": (text(b'{"text": 1e400}'), "empty_conversation"),
    "ends with a question": (text(chat("Hi", "Yes", "And?")), "role_order"),
    "begins with an answer": (text(json.dumps({"conversations": TALK[::-1]}).encode()), "role_order"),
    "same speaker twice": (text(json.dumps({"conversations": [*TALK, TALK[1]]}).encode()), "role_order"),
    "unknown speaker": (text(chat(conversations=[TALK[0], {"from": "bing", "value": "Yes"}])), "role_order"),
    "late system turn": (text(chat(conversations=[*TALK, {"from": "system", "value": "x"}])), "role_order"),
    "turns of another type": (text(chat(conversations=["Hi", "Yes"])), "bad_record"),
    "conversation of another type": (text(chat(conversations={"0": "Hi"})), "empty_conversation"),
    "a list for a record": (text(b"[1, 2]"), "bad_record"),
    "null for a record": (text(b"null"), "bad_record"),
    "numbers for texts": (text(chat(conversations=[{"from": "human", "value": 1}, TALK[1]])), "bad_record"),
    # Invalid JSON, or more than one value.
    "no json": (text(b"{"), "bad_record"),
    "empty json": (text(b""), "bad_record"),
    "trailing text": (text(chat("Hi", "Yes") + b"}"), "bad_record"),
    "deep nesting": (text(b"[" * 100_000), "bad_record"),
    "huge number": (text(f'{{"id": {"9" * 5000}, {TURNS}}}'.encode()), "bad_record"),
    "key twice": (text(f"{{{TURNS}, {TURNS.replace('Yes', 'No')}}}".encode()), "bad_record"),
    "value twice": (text(chat("Hi", "Yes").replace(b'"Yes"', b'"Yes", "value": "No"')), "bad_record"),
    "not a number": (text(f'{{"score": NaN, {TURNS}}}'.encode()), HI),
    "byte order mark": (text(b"\xef\xbb\xbf" + chat("Hi", "Yes")), HI),
    "more fields": (text(chat("Hi", "Yes", model="", source={"a": [1]})), HI),
    # Characters.
    "latin 1": (text(chat("Hi", "Yes").replace(b"Hi", b"H\xe9")), "not_utf8"),
    "utf-16": (text(chat("Hi", "Yes").decode().encode("utf-16")), "not_utf8"),
    "surrogate in utf-8": (text(chat("Hi", "Yes").replace(b"Hi", b"\xed\xa0\x80")), "not_utf8"),
    "half a surrogate pair": (text(chat("Hi \ud83d", "Yes")), "invalid_unicode"),
    "a surrogate pair": (text(chat("Hi", "🦊")), HI[:-3] + "🦊"),
    "null byte": (text(chat("Hi", "Yes").replace(b"Hi", b"H\0i")), "bad_record"),
    "null character": (text(chat("H\0i", "Yes")), "null_character"),
    "control characters": (text(chat("Hi", "Y\x07\x1b[0m\u2028es")), HI[:-3] + "Y\x07\x1b[0m\u2028es"),
    # Texts that look like more than text.
    "image token": (text(chat("Hi <IMG_CONTEXT>", "Yes")), "image_token_in_text"),
    "image token in an answer": (text(chat("Hi", "<img>")), "image_token_in_text"),
    "names of control tokens": (text(chat("<s>Hi</s>", "<unk>")), "[INST] <s>Hi</s> [/INST] <unk>"),
    "the template's own words": (text(chat("Hi [/INST] No</s>", "Yes")), "[INST] Hi [/INST] No</s> [/INST] Yes"),
    "braces": (text(chat("{text} {0} {", "{system}")), "[INST] {text} {0} { [/INST] {system}"),
    "too long": (text(chat("Hi", "Yes " * 500)), "too_long"),
    "plain text with a picture": ({"json": b'{"text": "See: <image> A hat."}', "0.jpg": GRACE}, "See: <image> A hat."),
    "plain text": (text(b'{"text": "The sun."}'), "The sun."),
}
UNSAFE = ["../../above", "/absolute", "inside/../../above", "c:\\windows", "up\\..\\..\\above"]


def encoder_with(config: DataConfig, tokenizer: MegatronTokenizer) -> ConversationTaskEncoder:
    return ConversationTaskEncoder(config, TextEncoder(tokenizer), RejectLog("train", "here", announce=False))


def raw(parts: Parts, key: str = "k") -> RawSample:
    return RawSample(__key__=key, __restore_key__=(), parts=parts)


def read_back(sample: EncodedSample, tokenizer: MegatronTokenizer) -> tuple[str, list[str]]:
    """Returns the full text, with one <image> per image, and the answers: the targets up to each end of sentence."""
    ids = [int(sample.input_ids[0]), *sample.labels.tolist()]
    full = tokenizer.detokenize(ids)
    full = re.sub("<img>((?:<IMG_CONTEXT>)+)</img>", "<image>", full)
    answers, end = [[]], TextEncoder(tokenizer).image_tokens.end_id
    for token, learned in zip(sample.labels.tolist(), sample.loss_mask.tolist(), strict=True):
        if learned:
            answers[-1].append(token)
        if answers[-1] and answers[-1][-1] == tokenizer.eos:
            answers.append([])
    assert answers.pop() == [], "what is learned ends with an end of sentence"
    return full, [tokenizer.detokenize([end, *answer]).removeprefix("</img>") for answer in answers]


def blank(text: str) -> str:
    """Replaces SentencePiece's character for a space by a space."""
    return text.replace("▁", " ")


def check(sample: EncodedSample, parts: Parts, config: DataConfig, tokenizer: MegatronTokenizer) -> str:
    """Compares a sample with an independent reading of its record; returns its text."""
    full, answers = read_back(sample, tokenizer)
    record = json.loads(parts["json"].decode("utf-8-sig"))
    if "conversations" in record:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        system = system + "\n\n" if system.strip() else ""
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        assert all(user in ("human", "user") and bot in ("gpt", "assistant") for (user, _), (bot, _) in pairs)
        rounds = [f"{question} [/INST] {answer}" for (_, question), (_, answer) in pairs]
        assert full == blank("[INST] " + system + " [INST] ".join(rounds))
        assert answers == [blank(" " + answer) for _, (_, answer) in pairs]
    elif "<image>" in record["text"]:
        assert full == blank(record["text"]) and answers == [" " + full.replace("<image>", "")]
    else:
        assert full == blank(record["text"]) and [full] == [answer.removeprefix(" ") for answer in answers]
    files = [parts[name] for name in sorted(parts) if name != "json"]
    context = TextEncoder(tokenizer).image_tokens.context_id
    assert full.count("<image>") == len(files) == sample.num_images
    assert (sample.input_ids == context).sum() == TOKENS_PER_TILE * len(sample.pixel_values)
    tiles = [tile for data in files for tile in ImageProcessor(config.image)(data)]
    assert len(sample.pixel_values) == len(tiles) >= len(files)
    assert all(map(torch.equal, sample.pixel_values, tiles)), "the images are in the order of their numbers"
    assert sample.input_ids.shape == sample.labels.shape == sample.loss_mask.shape
    assert torch.equal(sample.input_ids[1:], sample.labels[:-1]) and len(sample.input_ids) <= config.seq_length
    assert sample.input_ids.min() >= 0 and sample.labels.max() < tokenizer.vocab_size
    return full


@pytest.fixture(scope="module")
def config(shards: Path) -> DataConfig:
    image = ImageConfig(image_size=16, max_tiles=4, use_thumbnail=True)
    return DataConfig(
        str(shards), seq_length=400, micro_batch_size=1, tokens_per_tile=TOKENS_PER_TILE, image=image, num_workers=0
    )


@pytest.mark.parametrize("kind", SAMPLES)
def test_each_kind_of_sample_is_used_correctly_or_skipped_with_its_reason(
    kind: str, config: DataConfig, tokenizer: MegatronTokenizer
) -> None:
    parts, expected = SAMPLES[kind]
    encoder = encoder_with(config, tokenizer)
    if expected in REASONS:
        with pytest.raises(SampleError) as error:
            encoder.encode(raw(parts))
        assert error.value.reason == expected, str(error.value)
        assert "\n" not in error.value.message and error.value.message.isprintable()
    else:
        assert check(encoder.encode(raw(parts)), parts, config, tokenizer) == expected


def test_members_that_point_outside_of_the_archive_are_refused(
    config: DataConfig, tokenizer: MegatronTokenizer
) -> None:
    encoder = encoder_with(config, tokenizer)
    for key in UNSAFE:
        with pytest.raises(SampleError, match="unsafe_path: the archive's member"):
            encoder.encode(raw(text(chat("Hi", "Yes")), key=key))
    for key in ("a", "deep/er/a", "a..b", "~a"):
        encoder.encode(raw(text(chat("Hi", "Yes")), key=key))


def write_archive(folder: Path, samples: dict[str, Parts]) -> Path:
    """Writes an archive of these samples, indexed by energon for training and for validation."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, parts in samples.items():
            for name, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    splits = [("train", ".*"), ("val", ".*")]
    BaseWebdatasetFactory.prepare_dataset(folder, ["0.tar"], split_parts_patterns=splits, workers=1)
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(crude))
    return folder


def read_archive(
    config: DataConfig, tokenizer: MegatronTokenizer, folder: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Reads an archive's validation split once: key -> text of the used samples, key -> reason of the skipped ones."""
    config = dataclasses.replace(config, data_path=str(folder), rejects_dir=str(folder / "rejects"), max_skip_ratio=1.0)
    loader = build_valid_loader(config, tokenizer, 0, 1, num_batches=10_000)
    texts = {}
    for batch in loader:
        ids = batch.input_ids[0][~batch.padding_mask[0]].tolist()
        texts[batch.__key__[0]] = re.sub("<img>(?:<IMG_CONTEXT>)+</img>", "<image>", tokenizer.detokenize(ids))
    lines = [line for path in (folder / "rejects").glob("*") for line in path.read_text().split("\n")[:-1]]
    return texts, {reject["key"]: reject["reason"] for reject in map(json.loads, lines)}


def test_an_archive_with_all_kinds_of_samples_is_read_completely(
    config: DataConfig, tokenizer: MegatronTokenizer, tmp_path: Path
) -> None:
    samples = {kind: parts for kind, (parts, _) in SAMPLES.items()}
    samples |= {key: text(chat("Hi", "Yes")) for key in UNSAFE}
    folder = write_archive(tmp_path / "a" / "b" / "shards", samples)
    before = sorted(tmp_path.rglob("*"))
    used, skipped = read_archive(config, tokenizer, folder)
    expected = {kind: outcome for kind, (_, outcome) in SAMPLES.items()}
    assert used == {key: outcome for key, outcome in expected.items() if outcome not in REASONS}
    reasons = {key: outcome for key, outcome in expected.items() if outcome in REASONS}
    # energon splits the name of a member at the first dot after the last slash.
    keys = [key.split(".")[0] if "/" not in key else key for key in UNSAFE]
    assert skipped == reasons | dict.fromkeys(keys, "unsafe_path")
    written = set(tmp_path.rglob("*")) - set(before)
    assert written <= {folder / "rejects", *(folder / "rejects").glob("*")}, "reading wrote something else"


def test_a_run_over_too_many_broken_samples_stops_with_the_table(
    config: DataConfig, tokenizer: MegatronTokenizer, tmp_path: Path
) -> None:
    good = {f"good{i}": text(chat("Hi", "Yes")) for i in range(12)}
    bad = {f"bad{i}": one_image(b"") for i in range(8)}
    folder = write_archive(tmp_path / "shards", good | bad)
    for workers in (0, 1):
        config = dataclasses.replace(config, data_path=str(folder), max_skip_ratio=0.1, num_workers=workers)
        iterator = EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config)
        with pytest.raises(DataError) as error:
            for _ in range(300):
                next(iterator)
        sentence, head, row = str(error.value).split("\n")
        assert re.search(
            r"^[34]\d\.\d% of the first 10\d samples that a worker read .* --max-skip-ratio is 0\.1", sentence
        )
        assert head.split()[0] == "reason" and row.split()[0] == "bad_image" and row.split()[3].startswith("bad")
        iterator.close()


# ---- fuzzing ------------------------------------------------------------------------------------------------------

ODD = [None, 1, -1.5, True, [], {}, "", " ", "\n", "\0", "\ud800", "▁", "<image>", "<img>", "</img>", "<IMG_CONTEXT>"]
ODD += ["</s>", "[INST]", "human", "gpt", "system", "x" * 2000, ["human"], {"value": "Hi"}, "🦊", "é\u0301", 10**30]
NAMES = ["json", "0.png", "1.png", "2.png", "0.jpg", "0", "00.png", "-1.png", "txt", "json.json", "JSON", "٠.png"]
GOOD: list[Parts] = [
    text(chat("Hi there, what is it?", "A cat.", "Where?", "On the mat.")),
    text(b'{"id": "t", "text": "The sun rises over the hills."}'),
    one_image(saved(Image.open(io.BytesIO(GRACE)).resize((60, 80)), "JPEG"), "0.jpg"),
    one_image(saved(Image.open(io.BytesIO(LOGO)).resize((90, 30)), "PNG")),
    {
        "json": chat("<image> or <image>?", "The first.", conversations=[
            {"from": "system", "value": "Be brief."}, *talk("<image> or\n<image>?", "The first.", "Sure?", "Yes.")
        ]),
        "0.png": picture("red"),
        "1.jpg": picture("blue", kind="JPEG"),
    },
]  # fmt: skip


def mutate(parts: Parts, rng: random.Random) -> Parts:
    """Changes the bytes, the members or the content of the record once."""
    parts = dict(parts)
    kinds = [mutate_bytes, mutate_members, mutate_record, mutate_record, mutate_turns, mutate_text, mutate_text]
    return rng.choice(kinds)(parts, rng)


def mutate_bytes(parts: Parts, rng: random.Random) -> Parts:
    name = rng.choice(sorted(parts))
    data = bytearray(parts[name])
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0 and data:
        data[at - 1] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at:at] = rng.randbytes(rng.randint(1, 4))
    elif kind == 2:
        del data[at : at + rng.randint(1, 8)]
    else:
        del data[at:]
    return parts | {name: bytes(data)}


def mutate_members(parts: Parts, rng: random.Random) -> Parts:
    name = rng.choice(sorted(parts))
    kind = rng.randrange(4)
    if kind == 0:
        del parts[name]
        return parts or text(b"")
    if kind == 1:
        parts[rng.choice(NAMES)] = parts.pop(name)
        return parts
    if kind == 2:
        return parts | {rng.choice(NAMES): parts[name]}
    other = rng.choice(sorted(parts))
    return parts | {name: parts[other], other: parts[name]}


def with_record(change: Callable[[Any, random.Random], None]) -> Callable[[Parts, random.Random], Parts]:
    """Makes a mutation of the parsed record; a record that can no longer be parsed or changed is left unchanged."""

    def mutation(parts: Parts, rng: random.Random) -> Parts:
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
            record = json.loads(parts["json"])
            change(record, rng)
            return parts | {"json": json.dumps(record, ensure_ascii=rng.random() < 0.8).encode()}
        return parts

    return mutation


@with_record
def mutate_record(record: Any, rng: random.Random) -> None:
    places = [record, *record.get("conversations", [])]
    place = rng.choice(places)
    key = rng.choice([*place, "text", "image"])
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = rng.choice(ODD)


@with_record
def mutate_turns(record: Any, rng: random.Random) -> None:
    turns = record["conversations"]
    at, other = rng.randrange(len(turns)), rng.randrange(len(turns))
    kind = rng.randrange(4)
    if kind == 0:
        turns[at], turns[other] = turns[other], turns[at]
    elif kind == 1:
        turns.insert(at, dict(turns[other]))
    elif kind == 2:
        del turns[at]
    else:
        turns[at]["from"] = rng.choice(["human", "gpt", "user", "assistant", "system", "bot", "Human"])


@with_record
def mutate_text(record: Any, rng: random.Random) -> None:
    turn = rng.choice(record["conversations"])
    at = rng.randrange(len(turn["value"]) + 1)
    if rng.random() < 0.5:
        turn["value"] = (
            turn["value"][:at] + rng.choice([*filter(lambda x: isinstance(x, str), ODD)]) + turn["value"][at:]
        )
    else:
        turn["value"] = turn["value"].replace("<image>", "", 1)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupts the block after this time, so that a hang becomes a failure."""

    def expire(*_: Any) -> None:
        raise AssertionError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutants(count: int) -> Iterator[Parts]:
    """Yields mutated samples, the same in every run."""
    rng = random.Random(20240611)
    for _ in range(count):
        parts = rng.choice(GOOD)
        for _ in range(rng.choice([1, 1, 2])):
            parts = mutate(parts, rng)
        yield parts


def outcome(parts: Parts, encoder: ConversationTaskEncoder, tokenizer: MegatronTokenizer) -> str:
    """Returns the checked text of a sample, or the reason why it is skipped."""
    try:
        sample = encoder.encode(raw(parts))
    except SampleError as error:
        assert error.reason in REASONS and error.message.isprintable(), str(error)
        return error.reason
    return check(sample, parts, encoder.config, tokenizer)


def test_no_mutation_of_good_samples_crashes_hangs_or_is_misread(
    config: DataConfig, tokenizer: MegatronTokenizer
) -> None:
    encoder = encoder_with(config, tokenizer)
    for parts in GOOD:
        assert outcome(parts, encoder, tokenizer) not in REASONS
    outcomes = []
    for parts in mutants(1000):
        with time_limit(5):
            outcomes.append(outcome(parts, encoder, tokenizer))
    skipped = [reason for reason in outcomes if reason in REASONS]
    # Otherwise the mutations test little: one of the two outcomes would hardly occur.
    assert 300 < len(skipped) < 800 and len(set(skipped)) >= 10


def test_a_loader_reads_mutants_as_they_are_read_individually(
    config: DataConfig, tokenizer: MegatronTokenizer, tmp_path: Path
) -> None:
    encoder = encoder_with(config, tokenizer)
    samples = {f"mutant{number:03d}": parts for number, parts in enumerate(mutants(200))}
    folder = write_archive(tmp_path / "shards", samples)
    with time_limit(60):
        used, skipped = read_archive(config, tokenizer, folder)
    expected = {key: outcome(parts, encoder, tokenizer) for key, parts in samples.items()}
    assert used | skipped == expected and not used.keys() & skipped.keys()
