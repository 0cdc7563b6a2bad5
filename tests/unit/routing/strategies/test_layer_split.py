# SPDX-License-Identifier: Apache-2.0
"""Layer split: which layers are hard."""

from types import SimpleNamespace

import pytest

from megatron_smar.routing.strategies.layer_split import LayerSplitConfig

NAMES = ("text", "vision")


def test_the_lower_layers_are_hard_and_those_above_are_free():
    config = LayerSplitConfig(("text=0-2", "vision=3"), layers=2)
    assert [config.allowed(layer, NAMES, 4) is None for layer in (1, 2, 3, 4)] == [False, False, True, True]
    assert config.allowed(2, NAMES, 4).int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]


def test_error_messages_name_the_flags_of_layer_split():
    with pytest.raises(ValueError, match="--layer-split-experts text=0-3 must name each of text, vision once"):
        LayerSplitConfig(("text=0-3",), layers=1).allowed(1, NAMES, 4)


@pytest.mark.parametrize(("layers", "moe_layers"), [(0, [1, 2]), (2, [1, 2]), (1, [2, 4]), (4, [2, 4])])
def test_a_number_with_moe_layers_only_above_or_only_below_is_refused(layers, moe_layers):
    with pytest.raises(ValueError, match=f"--layer-split-layers is {layers}"):
        LayerSplitConfig(layers=layers).check(SimpleNamespace(), moe_layers)
    LayerSplitConfig(layers=3).check(SimpleNamespace(), [2, 4])
    LayerSplitConfig(layers=layers).check(SimpleNamespace(), None)
