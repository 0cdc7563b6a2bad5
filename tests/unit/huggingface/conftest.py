# SPDX-License-Identifier: Apache-2.0
"""Fixtures: transformers without what earlier tests left in it."""

import pytest
from transformers import CONFIG_MAPPING


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory):
    """Sets another module cache than the user's, to which transformers copies modeling code before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """Clears transformers' registry, which would use the config class of loaded code for the next folder too."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
