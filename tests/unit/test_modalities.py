# SPDX-License-Identifier: Apache-2.0
"""The table of modalities, and what reads it."""

import pytest
import torch

from megatron_smar.modalities import Modalities
from megatron_smar.routing.modalities import modality_ids_from_tokens


def test_each_modality_has_its_id_name_and_placeholder():
    table = list(Modalities(("vision", "chart")))
    assert table == [(0, "text", None), (1, "vision", "<IMG_CONTEXT>"), (2, "chart", "<CHART_CONTEXT>")]
    assert len(Modalities()) == 2 and Modalities().names == ("text", "vision")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((), "must begin with vision"),
        (("chart", "vision"), "must begin with vision"),
        (("vision", "text"), "'text' cannot name a kind of images"),
        (("vision", "a chart"), "'a chart' cannot name a kind of images"),
        (("vision", "chart", "chart"), "names a kind of images twice"),
    ],
)
def test_a_table_that_would_confuse_modalities_is_refused_with_the_flag(images, message):
    with pytest.raises(ValueError, match=f"--image-modalities.*{message}"):
        Modalities(images)


def test_each_placeholder_gives_its_modality_and_padding_none():
    ids = torch.tensor([[9, 5, 4, 4, 5, 9]])
    padding = torch.tensor([[False, False, False, True, False, False]])
    assert modality_ids_from_tokens(ids, [5, 4], padding).tolist() == [[0, 1, 2, -1, 1, 0]]
    assert modality_ids_from_tokens(ids, [5], padding).tolist() == [[0, 1, 0, -1, 1, 0]]
