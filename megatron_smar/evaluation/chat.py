# SPDX-License-Identifier: Apache-2.0
"""Asks an export or a checkpoint one question, with or without an image, and yields the answer piece by piece.

A checkpoint is run as the model that `export` would write, but its weights are not written to disk: transformers' class
gets them directly from the checkpoint, and processor and chat template are made from the run's arguments.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, TextIteratorStreamer
from transformers.utils import logging

from megatron_smar import huggingface
from megatron_smar.checkpoint.metadata import run_arguments
from megatron_smar.conversion import composite
from megatron_smar.conversion.exporter import describe_export, layout_of, read_checkpoint
from megatron_smar.conversion.processor import write_processor
from megatron_smar.data.images import read_image
from megatron_smar.data.rejects import SampleError


@dataclass(frozen=True)
class Chat:
    """A model with its processor.

    Attributes:
        model: The transformers model, in evaluation mode.
        processor: The model's processor, with the chat template.
    """

    model: Any
    processor: Any

    def answer(self, question: str, image: Path | None, max_new_tokens: int, temperature: float) -> Iterator[str]:
        """Yields the answer piece by piece.

        Args:
            question: The question; the image is put before it, unless `<image>` in it says where.
            image: Image file; None for a question without an image.
            max_new_tokens: Largest number of tokens in the answer.
            temperature: Sampling temperature; with 0 the most likely token is always taken.

        Raises:
            ValueError: The image cannot be read, or the question has more image tags than there are images.
        """
        pictures = [] if image is None else [_read_picture(image)]
        if question.count("<image>") > len(pictures):
            raise ValueError("the question has more <image> tags than there are pictures: give one with --image.")
        if pictures and "<image>" not in question:
            question = f"<image>\n{question}"
        messages = [{"role": "user", "content": question}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=pictures or None,
            text=[prompt],
            return_tensors="pt",
            add_special_tokens=not (bos and prompt.startswith(bos)),
        ).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        failures: list[BaseException] = []
        thread = Thread(
            target=self._generate,
            args=(failures, streamer),
            kwargs={**inputs, "max_new_tokens": max_new_tokens, **sampling},
            daemon=True,
        )
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]

    def _generate(self, failures: list[BaseException], streamer: Any, **inputs: Any) -> None:
        try:
            self.model.generate(**inputs, streamer=streamer)
        except BaseException as error:  # raised again by `answer`, in the caller's thread
            failures.append(error)
            streamer.end()


def open_chat(source: Path, iteration: int | None = None, hf: Path | None = None, device: str = "cpu") -> Chat:
    """Loads a model and its processor.

    Args:
        source: Folder of an export, or of a checkpoint.
        iteration: A checkpoint's step; None for the latest checkpoint.
        hf: For a checkpoint, the folder with the model's config; None for the folder that the run used.
        device: Device to run the model on.

    Raises:
        ValueError: The folder is neither an export nor a checkpoint, or a file is missing.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    huggingface.register()  # uses this package's copy of the modeling code; code in a folder is never run
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give that of a checkpoint or of an export.")
    chat = _open_export(source) if (source / "config.json").is_file() else _open_checkpoint(source, iteration, hf)
    chat.model.eval().to(device)
    return chat


def _open_export(folder: Path) -> Chat:
    if not (folder / "processor_config.json").is_file() and not (folder / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{folder} has no processor (processor_config.json), which turns images into tokens: "
            "export the checkpoint again with this version's tools/checkpoint/convert.py."
        )
    processor = _open_processor(folder)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no model that transformers can load ({_first_line(error)}).") from error
    return Chat(model, processor)


def _open_checkpoint(load: Path, iteration: int | None, hf: Path | None) -> Chat:
    args = run_arguments(load, iteration)
    folder = hf or Path(str(getattr(args, "vision_model", "")))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{load} was trained with --vision-model {folder}, which is not there: give the folder of the import (hf/) "
            "as --hf."
        )
    source = read_checkpoint(load, folder, iteration)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        describe_export(source, folder, made, layout_of(source))
        if not write_processor(made, args, source.config):
            raise ValueError(f"{folder} has no tokenizer: give the folder of the import (hf/) as --hf.")
        processor, config = _open_processor(made), composite.load_config(made)
        generation = GenerationConfig.from_pretrained(made)
    state = {name: tensor.read() for name, tensor in source.tensors.items()}
    kind: Any = AutoModelForImageTextToText._model_mapping[type(config)]  # from_config would draw all weights first
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)
    model.generation_config = generation
    return Chat(model, processor)


def _open_processor(folder: Path) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            "transformers' image processor needs torchvision: install the release that goes with this torch."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no processor that transformers can load ({_first_line(error)}).") from error
    if not hasattr(processor, "image_processor") or processor.chat_template is None:
        raise ValueError(f"{folder} has no processor with a chat template: export the checkpoint again.")
    return processor


def _read_picture(path: Path) -> Image.Image:
    try:
        return Image.fromarray(read_image(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"--image {path} cannot be read ({error.strerror}): give the file of a picture.") from error
    except SampleError as error:
        raise ValueError(f"--image {path}: {error.message}; give another file.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
