# SPDX-License-Identifier: Apache-2.0
"""A small mixture for the planner's tests."""

from megatron_smar.planning.layout import Batch
from megatron_smar.planning.published import SMALL_MIXTRAL
from megatron_smar.planning.shape import ModelShape, Parameter, VisionShape

TOWER = VisionShape(
    hidden=1024, layers=24, heads=16, ffn=4096, patches=1024, extra_tokens=1, patch_values=588, tokens=256
)
SHAPE = ModelShape(
    SMALL_MIXTRAL.decoder,
    TOWER,
    SMALL_MIXTRAL.trained | {"connector"},
    (Parameter("vision_model", 300_000_000, "vision"), *SMALL_MIXTRAL.parameters),
)
BATCH = Batch(4096, 64, tiles=8, most_tiles=13, filled=0.5)


def with_trained(*parts: str) -> ModelShape:
    """Returns the model with other parts trained."""
    return ModelShape(SHAPE.decoder, SHAPE.vision, frozenset(parts), SHAPE.parameters)
