# SPDX-License-Identifier: Apache-2.0
"""The data pipeline: conversations with images, from shards to micro-batches."""

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.config import DataConfig
from megatron_smar.data.loader import EnergonIterator, build_train_loader, build_valid_loader
from megatron_smar.data.rejects import DataError, SampleError, read_rejects
from megatron_smar.data.state import load_loader_state
from megatron_smar.data.task_encoder import ConversationTaskEncoder
from megatron_smar.data.tiling import ImageConfig
from megatron_smar.data.tokens import ImageTokens

__all__ = [
    "ConversationTaskEncoder",
    "DataConfig",
    "DataError",
    "EnergonIterator",
    "ImageConfig",
    "ImageTokens",
    "SampleError",
    "VisionLanguageBatch",
    "build_train_loader",
    "build_valid_loader",
    "load_loader_state",
    "read_rejects",
]
