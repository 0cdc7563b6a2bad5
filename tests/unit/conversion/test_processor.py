# SPDX-License-Identifier: Apache-2.0
"""An export's processor produces the trainer's tokens and tiles, for any tokenizer, template and tiling."""

import functools
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.cbook import get_sample_data
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, InternVLConfig, MixtralConfig, SiglipVisionConfig

from megatron_smar.checkpoint.folders import ConversionError
from megatron_smar.conversion.processor import trainer_ids, write_processor
from megatron_smar.data.conversations import TEMPLATES, template_for
from megatron_smar.data.tiling import ImageConfig, ImageProcessor
from megatron_smar.data.tokens import IMAGE_TOKENS, TextEncoder, add_tokens
from megatron_smar.huggingface.modeling_modality_aware import ModalityAwareInternVLConfig
from megatron_smar.model.vision import VisionConfig, normalization, normalize
from tests.unit.data.conftest import (
    CHATML_TOKENS,
    convert_mistral,
    load_huggingface,
    load_tokenizer,
    mixtral_model,
    train_byte_level,
    train_llama_like,
    train_sentencepiece,
)

SIDE, PATCH = 32, 8
PHOTOGRAPH = Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
ALL = [*IMAGE_TOKENS, *CHATML_TOKENS]


def sentencepiece(folder: Path, **options: Any) -> Any:
    train_sentencepiece(folder / "tokenizer.model", **options)
    add_tokens(folder / "tokenizer.model", folder / "tokenizer.model", ALL)
    return load_tokenizer(folder / "tokenizer.model")


def mistral(folder: Path, version: str) -> Any:
    add_tokens(mixtral_model(version), folder / "tokenizer.model", ALL)
    return load_tokenizer(folder / "tokenizer.model")


def hugging_face(folder: Path) -> Any:
    add_tokens(folder, folder, ALL)
    return load_huggingface(folder, [])


TOKENIZERS: dict[str, Any] = {
    "SentencePiece": sentencepiece,
    "SentencePiece with symbols": lambda f: sentencepiece(f, user_defined_symbols=["[INST]", "[/INST]", "\n\n"]),
    "unigram": lambda f: sentencepiece(f, model_type="unigram", vocab_size=320),
    "no space in front": lambda f: sentencepiece(f, add_dummy_prefix=False),
    "Mixtral": lambda f: mistral(f, "v1"),
    "Mistral v3": lambda f: mistral(f, "v3"),
    "Mistral v7, folder": lambda f: hugging_face(convert_mistral("v7", f)),
    "byte level": lambda f: hugging_face(train_byte_level(f)),
    "Llama-like": lambda f: hugging_face(train_llama_like(f, ["\n\n", "\nWhat"])),
    "Metaspace": lambda f: hugging_face(train_llama_like(f, ["\n\n", "\nWhat"], "always")),
}


def write(folder: Path, tokenizer: Any, template: str, tower: Any = None, **args: Any) -> dict[str, Any]:
    """Writes a folder's config.json and processor; returns the processor's settings."""
    vision = tower or {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    context = TextEncoder(tokenizer).image_tokens.context_id
    kind = ModalityAwareInternVLConfig if tower else InternVLConfig
    config = kind(vision_config=vision, text_config=MixtralConfig(), image_token_id=context, downsample_ratio=0.5)
    config.save_pretrained(folder)
    assert write_processor(folder, Namespace(conversation_template=template, **args), config)
    return json.loads((folder / "processor_config.json").read_text())


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    @functools.cache
    def build(kind: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("tokenizer")
        return folder, TOKENIZERS[kind](folder)

    return build


# Every template with a tokenizer of each family, and every other tokenizer with one template.
PAIRS = [(kind, template) for kind in ("SentencePiece", "byte level", "Llama-like") for template in TEMPLATES]
PAIRS += [(kind, "mistral") for kind in ("SentencePiece with symbols", "Mixtral", "Mistral v3", "Mistral v7, folder")]
PAIRS += [(kind, "vicuna_v1") for kind in ("unigram", "no space in front", "Metaspace")]
texts = st.text(alphabet="ab What\n\t .é🦊/", min_size=1, max_size=8).filter(str.strip)
turns = st.tuples(texts, texts.map(str.lstrip))


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_transformers_produces_the_trainers_tokens(
    kind: str, template: str, make: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, tokenizer = make(kind)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, tokenizer, template)
    processor = AutoProcessor.from_pretrained(tmp_path)
    resolved = template_for(template, tokenizer)
    encoder = TextEncoder(tokenizer, resolved.special_tokens)
    assert len(processor.tokenizer) == tokenizer.vocab_size, "a token has no row in the embedding"
    picture = Image.new("RGB", (SIDE, SIDE))

    @given(
        turns=st.lists(st.tuples(texts, texts.map(str.lstrip)), min_size=1, max_size=2),
        system=st.one_of(st.none(), texts),
    )
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    def check(turns: list[tuple[str, str]], system: str | None) -> None:
        said = [("system", system)] if system is not None else []
        for number, (question, answer) in enumerate(turns):
            said += [("user", question if number else f"<image>\n{question}"), ("assistant", answer)]
        # These do not split text into words: a piece may join the end of a question and its answer, which the trainer
        # keeps separate.
        answered = kind not in ("Llama-like", "Metaspace")
        said = said if answered else said[: len(said) - 2 * len(turns) + 2]
        messages = [{"role": role, "content": text} for role, text in (said if answered else said[:-1])]
        prompt = processor.apply_chat_template(messages, tokenize=False)
        ids = processor(images=[picture], text=[prompt], add_special_tokens=not encoder.bos_id)["input_ids"][0]
        assert [*ids].count(encoder.image_tokens.context_id) == 4
        kept = [i for n, i in enumerate(ids) if i != encoder.image_tokens.context_id or ids[n - 1] != i]
        assert kept == trainer_ids(encoder, resolved, said, answered)

    check()


def test_the_parts_of_a_message_are_joined_as_in_llavas_records(
    make: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, tokenizer = make("SentencePiece")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, tokenizer, "vicuna_v1")
    processor = AutoProcessor.from_pretrained(tmp_path)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    both = [
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in (parts, "<image>\nWhat?")
    ]
    assert both[0] == both[1] and both[0].endswith("USER: <IMG_CONTEXT>\nWhat? ASSISTANT:")


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TOWERS = {
    "InternViT": None,
    "CLIP": CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH),
    "SigLIP": SiglipVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH),
}
TILINGS = [(1, 1, False), (1, 12, True), (2, 6, True), (1, 6, False), (3, 3, False)]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("least", "most", "thumbnail"), TILINGS)
def test_transformers_produces_the_trainers_tiles(
    tower: str, least: int, most: int, thumbnail: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "export"
    folder.mkdir()
    tokenizer = hugging_face(train_byte_level(folder))
    tiling = {"min_tiles": least, "max_tiles": most, "use_thumbnail": thumbnail}
    written = write(folder, tokenizer, "chatml", TOWERS[tower], **tiling)
    assert written["image_seq_length"] == 4
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    trainers = ImageProcessor(ImageConfig(image_size=SIDE, **tiling))
    mean, std = normalization(VisionConfig(str(folder), SIDE))
    assert len({*mean}) == (1 if tower == "SigLIP" else 3)
    for size in ((512, 600), (90, 31), (31, 200), (32, 32), (64, 64)):
        picture = Image.open(PHOTOGRAPH).convert("RGB").resize(size)
        picture.save(tmp_path / "picture.png")
        expected = normalize(trainers((tmp_path / "picture.png").read_bytes()), mean, std)
        found = processor(images=[picture], text=["<IMG_CONTEXT>"], return_tensors="pt")
        torch.testing.assert_close(found["pixel_values"], expected, atol=1e-5, rtol=1e-5)
        assert int((found["input_ids"] == TextEncoder(tokenizer).image_tokens.context_id).sum()) == 4 * len(expected)
        numbers = processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])])
        assert numbers["num_image_patches"] == [len(expected)], "vLLM reserves this number of tiles"


def test_generation_stops_at_the_templates_end_of_turn_and_at_eos(tmp_path: Path) -> None:
    tokenizer = hugging_face(train_byte_level(tmp_path))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_k": 3}))
    write(tmp_path, tokenizer, "chatml")
    found = json.loads((tmp_path / "generation_config.json").read_text())
    ends = [tokenizer.tokenize(token)[0] for token in ("<|im_end|>", "<|endoftext|>")]
    assert found == {"eos_token_id": ends, "pad_token_id": ends[1], "top_k": 3}


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    hugging_face(train_byte_level(tmp_path))
    config = InternVLConfig(text_config=MixtralConfig(), image_token_id=5)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"<IMG_CONTEXT> is \d+, but config.json's image_token_id is 5: give"):
        write_processor(tmp_path, Namespace(conversation_template="vita"), config)
