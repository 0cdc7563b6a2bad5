# SPDX-License-Identifier: Apache-2.0
"""Writes what an export needs besides weights for generation: tokenizer, chat template, image processor.

All of it uses transformers' classes (`InternVLProcessor`) and produces the tokens and tiles that the run was trained
on. One setting has no field in transformers' files: several tiles without a thumbnail. For it a class is written too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.tokenizers import MegatronTokenizer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter

from megatron_smar import huggingface
from megatron_smar.checkpoint.folders import ConversionError
from megatron_smar.conversion.chat_template import chat_template
from megatron_smar.data.conversations import ConversationTemplate, record_segments, template_for, tokenize_segments
from megatron_smar.data.exactness import set_prefix
from megatron_smar.data.tiling import ImageConfig
from megatron_smar.data.tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, IMAGE_TOKENS, TextEncoder, load_huggingface
from megatron_smar.model.vision import VisionConfig, normalization, side_in_pixels, tokens_per_tile

TILES_CODE = huggingface.CODE.with_name("image_processing_without_thumbnail.py")
# Files of the imported tokenizer that are deleted: the export's own tokenizer has all of it in two files.
SUPERSEDED = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "video_preprocessor_config.json")
# Questions for which the export's token ids are compared with the trainer's.
QUESTIONS = (
    "<image>\nWhat is in the picture?",
    "\n And \t <image>\n<image>",
    "Here <image> is\n\nwhat?  ",
    "What is it, Über 🦊?<image>",
    " 3.14 = π",
)


@dataclass(frozen=True)
class _Tokenizer:
    """A folder's tokenizer as the trainer reads it, and as transformers will read it."""

    trainer: Any
    fast: PreTrainedTokenizerFast


def write_processor(folder: Path, args: Any, config: PretrainedConfig) -> bool:
    """Writes tokenizer, chat template, processor and generation config into an export's folder.

    Args:
        folder: The export's folder, with config.json and the imported tokenizer.
        args: The run's arguments, from its checkpoint.
        config: The composite model's config.

    Returns:
        Whether the folder has a tokenizer; without one nothing is written.

    Raises:
        ConversionError: transformers would not produce the token ids that the model was trained on.
    """
    found = trained_tokenizer(folder, args)
    if found is None:
        return False
    fast, encoder, template = found.fast, found.encoder, found.template
    if encoder.image_tokens.context_id != config.image_token_id:
        raise ConversionError(
            f"the tokenizer's {IMAGE_CONTEXT} is {encoder.image_tokens.context_id}, but config.json's image_token_id "
            f"is {config.image_token_id}: give the --hf that the run was trained with."
        )
    for name in SUPERSEDED:
        (folder / name).unlink(missing_ok=True)
    fast.save_pretrained(folder)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    vision = VisionConfig(str(folder), side_in_pixels(config.vision_config.image_size), config.downsample_ratio)
    images = ImageConfig(
        vision.image_size,
        getattr(args, "min_tiles", 1),
        getattr(args, "max_tiles", 1),
        bool(getattr(args, "use_thumbnail", False)),
    )
    _write_images(folder, images, vision)
    _write_generation(folder, encoder, template)
    return True


@dataclass(frozen=True)
class TrainedTokenizer:
    """A run's tokenizer for transformers, which gives the ids that the model was trained on.

    Attributes:
        fast: The tokenizer, with its chat template.
        encoder: The trainer's encoder of the same text.
        template: The run's conversation template.
    """

    fast: PreTrainedTokenizerFast
    encoder: TextEncoder
    template: ConversationTemplate

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return sorted({self.encoder.special_id(self.template.end_of_turn), self.encoder.eos_id})


def trained_tokenizer(folder: Path, args: Any) -> TrainedTokenizer | None:
    """Makes transformers' tokenizer of a run.

    Args:
        folder: Folder with the run's tokenizer.
        args: The run's arguments.

    Returns:
        The tokenizer, or None if the folder has none.

    Raises:
        ConversionError: transformers would not produce the token ids that the model was trained on.
    """
    found = _read_tokenizer(folder, str(getattr(args, "tokenizer_type", "")))
    if found is None:
        return None
    template = template_for(getattr(args, "conversation_template", "mistral"), found.trainer)
    encoder = TextEncoder(found.trainer, template.special_tokens)
    fast = _with_special_tokens(found.fast, encoder, template)
    fast.chat_template = chat_template(template, encoder.puts_space)
    _compare(fast, encoder, template)
    return TrainedTokenizer(fast, encoder, template)


def _read_tokenizer(folder: Path, kind: str) -> _Tokenizer | None:
    model, has_folder = folder / "tokenizer.model", (folder / "tokenizer_config.json").is_file()
    if model.is_file() and (kind == "SentencePieceTokenizer" or not has_folder):
        trainer = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}, legacy=False
        )
        return _Tokenizer(trainer, _from_sentencepiece(model))
    if not has_folder:
        return None
    fast = _from_hugging_face(folder)
    trainer = MegatronTokenizer.from_pretrained(tokenizer_path=str(folder), metadata_path={"library": "huggingface"})
    return _Tokenizer(trainer, fast)


def _from_sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    """Converts a SentencePiece model to transformers' tokenizer, which puts its space in front of a text only."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.read_bytes())
    pieces = list(proto.pieces)
    unigram = proto.trainer_spec.model_type == 1
    vocabulary: Any = (
        [(piece.piece, piece.score) for piece in pieces]
        if unigram
        else {piece.piece: number for number, piece in enumerate(pieces)}
    )
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, legacy=False)
    control = [piece.piece for piece in pieces if piece.type == piece.CONTROL]
    backend.add_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    spec = proto.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    names = {name: pieces[i].piece for name, i in ids.items() if 0 <= i < len(pieces)}
    if bos := names.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _from_hugging_face(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a folder's tokenizer and has it put its space in front of a text only, not after each special token."""
    fast = load_huggingface(folder)
    settings = json.loads(fast.backend_tokenizer.to_str())
    set_prefix(settings, "first")
    for token in settings["added_tokens"]:
        if token["special"]:  # otherwise text next to a special token would lose its spaces
            token |= {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    names = {name: str(token) for name, token in fast.special_tokens_map.items() if name.endswith("_token")}
    known = {"unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token"}
    backend = Tokenizer.from_str(json.dumps(settings))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fast.model_max_length,
        **{name: token for name, token in names.items() if name in known},
    )


def _with_special_tokens(
    fast: PreTrainedTokenizerFast, encoder: TextEncoder, template: ConversationTemplate
) -> PreTrainedTokenizerFast:
    """Adds the special tokens that the processor and the chat template look up by name."""
    special = [*IMAGE_TOKENS, *template.special_tokens]
    fast.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {"start_image_token": IMAGE_START, "end_image_token": IMAGE_END, "context_image_token": IMAGE_CONTEXT}
    # The processor also requires a video token. Videos are not supported: reuse a token that no prompt contains.
    names["video_token"] = IMAGE_END
    known = {name: str(token) for name, token in fast.special_tokens_map.items() if name.endswith("_token")}
    known.setdefault("pad_token", str(fast.convert_ids_to_tokens(encoder.pad_id)))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast.backend_tokenizer,
        extra_special_tokens=names,
        model_max_length=fast.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **{name: token for name, token in known.items() if name not in names},
    )


def _compare(fast: PreTrainedTokenizerFast, encoder: TextEncoder, template: ConversationTemplate) -> None:
    """Compares the token ids that transformers will produce with the trainer's.

    Raises:
        ConversionError: The ids differ.
    """
    for question in QUESTIONS:
        for system in ([], [("system", "Be nice.\n")]):
            turns = [*system, ("user", question)]
            expected = trainer_ids(encoder, template, [*turns, ("assistant", "x")], answered=False)
            messages = [{"role": role, "content": text} for role, text in turns]
            prompt = str(fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            placed = prompt.replace(IMAGE_CONTEXT, f"{IMAGE_START}{IMAGE_CONTEXT}{IMAGE_END}")
            found = fast(placed, add_special_tokens=False)["input_ids"]
            if expected != found:
                raise ConversionError(
                    "transformers would not read questions as the model was trained on them: from "
                    f"{prompt!r} it makes {found}, the trainer {expected}; export with --no-processor, and give the "
                    "model the trainer's ids."
                )


def trainer_ids(
    encoder: TextEncoder, template: ConversationTemplate, turns: Sequence[tuple[str, str]], answered: bool = True
) -> list[int]:
    """Returns the token ids that the trainer makes of a conversation, with one placeholder for each image.

    Args:
        encoder: The trainer's text encoder.
        template: The conversation template.
        turns: Roles and texts; the last turn is an answer.
        answered: Whether to include the answers.
    """
    number = sum(text.count("<image>") for _, text in turns)
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    segments = record_segments(record, template, number)
    shown = [segment for segment in segments if answered or not segment.is_target]
    ids, _ = tokenize_segments(shown, encoder, [1] * number)
    return ids


def _write_images(folder: Path, images: ImageConfig, vision: VisionConfig) -> None:
    """Writes the settings of processor and image processor as JSON; their own classes would need torchvision."""
    mean, std = normalization(vision)
    size = {"height": images.image_size, "width": images.image_size}
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": std,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": size,
    }
    tiles = {"crop_to_patches": True, "min_patches": images.min_tiles, "max_patches": images.max_tiles}
    processor: dict[str, Any] = common | tiles | {"image_processor_type": "GotOcr2ImageProcessor"}
    if images.max_tiles > 1 and not images.use_thumbnail:
        shutil.copyfile(TILES_CODE, folder / TILES_CODE.name)
        name = "ImageProcessorWithoutThumbnail"
        processor |= {"image_processor_type": name, "auto_map": {"AutoImageProcessor": f"{TILES_CODE.stem}.{name}"}}
    video = common | {"video_processor_type": "InternVLVideoProcessor"}
    full = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": tokens_per_tile(vision),
        "image_processor": processor,
        "video_processor": video,
    }
    for name, content in (("processor_config.json", full), ("preprocessor_config.json", processor)):
        (folder / name).unlink(missing_ok=True)
        _write_json(folder / name, content)
    # Older tools look for the class here.
    _write_json(folder / "preprocessor_config.json", {"processor_class": "InternVLProcessor"})


def _write_generation(folder: Path, encoder: TextEncoder, template: ConversationTemplate) -> None:
    ends = dict.fromkeys((encoder.special_id(template.end_of_turn), encoder.eos_id))
    fields: dict[str, Any] = {"eos_token_id": list(ends), "pad_token_id": encoder.pad_id}
    if encoder.bos_id is not None:
        fields["bos_token_id"] = encoder.bos_id
    _write_json(folder / "generation_config.json", fields)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    """Adds fields to a JSON file, replacing fields of the same name."""
    have = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(have | fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
