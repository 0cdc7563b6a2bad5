# SPDX-License-Identifier: Apache-2.0
"""The model that a checkpoint is compared with: a composite model, or the language model and tower it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from megatron_smar import huggingface
from megatron_smar.checkpoint.safetensors_io import read_folder
from megatron_smar.checkpoint.torch_dist import CheckpointReader
from megatron_smar.conversion import composite, original_layouts
from megatron_smar.conversion.importer import read_rows
from megatron_smar.conversion.sources import read_tower
from megatron_smar.model.vision import VisionConfig, load_tower, normalization, normalize, side_in_pixels

EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"


def load_whole(hf: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a composite model from its folder, without running code of the folder."""
    huggingface.register()
    return AutoModelForImageTextToText.from_pretrained(hf, dtype=dtype, use_safetensors=True, trust_remote_code=False)


def load_parts(load: Path, language: Path, vision: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a language model and a vision tower from their own folders, and combines them as an import does.

    transformers' own classes load both. The connector is the checkpoint's, since the folders have none, and rows added
    to the vocabulary are the mean of the others.

    Args:
        load: The import's folder.
        language: Folder of the causal language model.
        vision: Folder of the vision encoder, or of a model with a vision encoder.
        dtype: Data type of the weights.
    """
    huggingface.register()
    config = composite.load_composite(load / "hf")
    text = AutoModelForCausalLM.from_pretrained(language, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    _grow(text, language, config.text_config.vocab_size)
    with torch.device("meta"):  # all parts are replaced below
        composed = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    composed.model.language_model, composed.lm_head = text.base_model, text.get_output_embeddings()
    composed.model.vision_tower = _load_tower(vision, config.vision_config, dtype)
    connector = {name: tensor.to(dtype) for name, tensor in _connector_of(load, config).items()}
    composed.model.multi_modal_projector.load_state_dict(connector, assign=True)
    return composed


def _grow(text: PreTrainedModel, folder: Path, vocab_size: int) -> None:
    """Appends rows to the vocabulary, rounded like the import's rows: to the data type of the folder's weights."""
    stored = read_folder(folder)
    embedding, output = text.get_input_embeddings(), text.get_output_embeddings()
    tied = output.weight is embedding.weight
    for name, module in ((EMBEDDING, embedding), (OUTPUT, output)):
        for kind, rows in list(module.named_parameters()):
            kept = stored[f"{name}.{kind}"].dtype if f"{name}.{kind}" in stored else rows.dtype
            mean = rows.detach().double().mean(dim=0, keepdim=True).to(kept).to(rows.dtype)
            more = mean.expand(vocab_size - len(rows), *rows.shape[1:])
            setattr(module, kind, nn.Parameter(torch.cat([rows.detach(), more])))
    if tied:
        output.weight = embedding.weight


def _load_tower(vision: Path, tower: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if not original_layouts.is_tower(composite.read_content(vision)):
        return load_tower(VisionConfig(str(vision), side_in_pixels(tower.image_size)), tower, dtype)
    model = AutoModel.from_config(tower, dtype=dtype)  # an original InternViT: its names differ from transformers'
    source, own = read_tower(vision), model.state_dict()
    for row in source.table:
        target = own[row.megatron.removeprefix(composite.TOWER)]
        target.copy_(read_rows(row, source.tensors, 0, tuple(target.shape), len(target), target.dtype))
    return model


def _connector_of(load: Path, config: PretrainedConfig) -> Mapping[str, Tensor]:
    reader = CheckpointReader(load)
    found = {}
    for row in composite.connector_weights(composite.connection_of(config).connector, None):
        size = tuple(reader.tensors[row.megatron].size)
        found[row.hf[0].removeprefix(composite.PROJECTOR)] = reader.read(row.megatron, (0,) * len(size), size)
    return found


@torch.no_grad()
def reference_logits(model: PreTrainedModel, hf: Path, ids: Tensor, tiles: Tensor, device: str) -> Tensor:
    """Returns a model's logits [b, s, vocabulary] in float32.

    Args:
        model: A model from `load_whole` or `load_parts`.
        hf: Folder with the model's config and processor.
        ids: Token ids [b, s].
        tiles: Tiles of all rows, [n, 3, size, size] uint8.
        device: Device to run the model on.
    """
    logging.disable_progress_bar()
    model = model.eval().to(device)
    pixels = normalize(tiles, *normalization(VisionConfig(str(hf), tiles.shape[-1], model.config.downsample_ratio)))
    logits: Tensor = model(input_ids=ids.to(device), pixel_values=pixels.to(device, model.dtype)).logits
    return logits.float().cpu()
