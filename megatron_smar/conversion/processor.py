# SPDX-License-Identifier: Apache-2.0
"""What an export needs beside its weights to be asked something: tokenizer, chat template, image processor.

All of it is transformers' own (`InternVLProcessor`) and gives the tokens and tiles that the run was trained on. One
thing transformers cannot say in a file: several tiles without a thumbnail, for which a class comes along.
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
from megatron_smar.model.vision import VisionConfig, normalisation, side_in_pixels, tokens_per_tile

TILES_CODE = huggingface.CODE.with_name("image_processing_without_thumbnail.py")
# Of the tokenizer that was imported; the export's own says all of it in two files.
SUPERSEDED = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "video_preprocessor_config.json")
# Questions on which the export's ids are compared with the trainer's.
QUESTIONS = (
    "<image>\nWhat is in the picture?",
    "\n And \t <image>\n<image>",
    "Here <image> is\n\nwhat?  ",
    "What is it, Über 🦊?<image>",
    " 3.14 = π",
)


@dataclass(frozen=True)
class _Tokenizer:
    """A folder's tokenizer as the trainer reads it and as transformers will."""

    trainer: Any
    fast: PreTrainedTokenizerFast


def write_processor(folder: Path, args: Any, config: PretrainedConfig) -> bool:
    """Write tokenizer, chat template, processor and generation config into an export's folder.

    Args:
        folder: The export's, with config.json and the tokenizer that was imported.
        args: The run's arguments, from its checkpoint.
        config: Of the composite model.

    Returns:
        Whether there is a tokenizer to make one of.

    Raises:
        ConversionError: transformers would not give the ids that the model was trained on.
    """
    found = _read_tokenizer(folder, str(getattr(args, "tokenizer_type", "")))
    if found is None:
        return False
    template = template_for(getattr(args, "conversation_template", "mistral"), found.trainer)
    encoder = TextEncoder(found.trainer, template.special_tokens)
    if encoder.image_tokens.context_id != config.image_token_id:
        raise ConversionError(
            f"the tokenizer's {IMAGE_CONTEXT} is {encoder.image_tokens.context_id}, but config.json's image_token_id "
            f"is {config.image_token_id}: give the --hf that the run was trained with."
        )
    fast = _named(found.fast, encoder, template)
    fast.chat_template = chat_template(template, encoder.puts_space)
    _compare(fast, encoder, template)
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


def _read_tokenizer(folder: Path, kind: str) -> _Tokenizer | None:
    model, has_folder = folder / "tokenizer.model", (folder / "tokenizer_config.json").is_file()
    if model.is_file() and (kind == "SentencePieceTokenizer" or not has_folder):
        trainer = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}, legacy=False
        )
        return _Tokenizer(trainer, _of_sentencepiece(model))
    if not has_folder:
        return None
    fast = _of_hugging_face(folder)
    trainer = MegatronTokenizer.from_pretrained(tokenizer_path=str(folder), metadata_path={"library": "huggingface"})
    return _Tokenizer(trainer, fast)


def _of_sentencepiece(model: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece model as transformers' tokenizer, with its space in front of a text and nowhere else."""
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


def _of_hugging_face(folder: Path) -> PreTrainedTokenizerFast:
    """A folder's tokenizer, with its space in front of a text and not behind every special token."""
    fast = load_huggingface(folder)
    settings = json.loads(fast.backend_tokenizer.to_str())
    set_prefix(settings, "first")
    for token in settings["added_tokens"]:
        if token["special"]:  # text beside one would lose its spaces
            token |= {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    names = {name: str(token) for name, token in fast.special_tokens_map.items() if name.endswith("_token")}
    known = {"unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token"}
    backend = Tokenizer.from_str(json.dumps(settings))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fast.model_max_length,
        **{name: token for name, token in names.items() if name in known},
    )


def _named(
    fast: PreTrainedTokenizerFast, encoder: TextEncoder, template: ConversationTemplate
) -> PreTrainedTokenizerFast:
    """The tokenizer with the special tokens that the processor and the chat template look up by their names."""
    special = [*IMAGE_TOKENS, *template.special_tokens]
    fast.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {"start_image_token": IMAGE_START, "end_image_token": IMAGE_END, "context_image_token": IMAGE_CONTEXT}
    # The processor wants a token for videos too, which there are none of: one that no prompt has, and not a new one.
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
    """Compare the ids that transformers will give with the trainer's.

    Raises:
        ConversionError: They differ.
    """
    for question in QUESTIONS:
        for system in ([], [("system", "Be nice.\n")]):
            turns = [*system, ("user", question)]
            ours = trainer_ids(encoder, template, [*turns, ("assistant", "x")], answered=False)
            messages = [{"role": role, "content": text} for role, text in turns]
            prompt = str(fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            placed = prompt.replace(IMAGE_CONTEXT, f"{IMAGE_START}{IMAGE_CONTEXT}{IMAGE_END}")
            theirs = fast(placed, add_special_tokens=False)["input_ids"]
            if ours != theirs:
                raise ConversionError(
                    "transformers would not read questions as the model was trained on them: of "
                    f"{prompt!r} it makes {theirs}, the trainer {ours}; export with --no-processor, and give the model "
                    "the trainer's ids."
                )


def trainer_ids(
    encoder: TextEncoder, template: ConversationTemplate, turns: Sequence[tuple[str, str]], answered: bool = True
) -> list[int]:
    """The ids that the trainer makes of turns, with one placeholder for each image.

    Args:
        encoder: Of text.
        template: How the turns are written.
        turns: Roles and texts; the last is an answer.
        answered: False leaves out the answers.
    """
    number = sum(text.count("<image>") for _, text in turns)
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    segments = record_segments(record, template, number)
    shown = [segment for segment in segments if answered or not segment.is_target]
    ids, _ = tokenize_segments(shown, encoder, [1] * number)
    return ids


def _write_images(folder: Path, images: ImageConfig, vision: VisionConfig) -> None:
    """The image processor's and the processor's settings, written without their classes, which need torchvision."""
    mean, std = normalisation(vision)
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
    whole = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": tokens_per_tile(vision),
        "image_processor": processor,
        "video_processor": video,
    }
    for name, content in (("processor_config.json", whole), ("preprocessor_config.json", processor)):
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
    """Writes fields into a file, beside those that it has."""
    have = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(have | fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
