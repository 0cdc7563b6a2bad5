# SPDX-License-Identifier: Apache-2.0
"""An export with a gate per modality computes what the trainer computes, using transformers only."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from tests.unit.huggingface.exports import GATED, GATES, IMAGE, Trainer, composite, export, load, samples


@pytest.fixture(scope="module")
def moiie(single_rank, tmp_path_factory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("moiie"), "moiie")


@torch.no_grad()
def test_gates_and_expert_groups_of_moiie_give_the_trainers_logits_and_answers(moiie):
    model, (ids, pixels) = load(moiie.folder), samples()
    expected = moiie.logits(ids, pixels)
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-4)
    settings = dict(attention_mask=torch.ones_like(ids[:2]), max_new_tokens=6, do_sample=False)
    answer = model.generate(input_ids=ids[:2], pixel_values=pixels, **settings)
    assert answer[:, ids.shape[1] :].tolist() == moiie.continuation(ids[:2], pixels, 6).tolist()
    for name in ("modality_weight_1", "modality_bias"):
        parts = [part for each, part in model.named_parameters() if each.endswith(name)]
        before = [part.clone() for part in parts]
        for part in parts:
            part.zero_()
        changed = model(input_ids=ids, pixel_values=pixels).logits - expected
        assert changed.abs().amax() > 1e-3, f"{name} has no effect, so it was not compared"
        for part, value in zip(parts, before, strict=True):
            part.copy_(value)


@torch.no_grad()
def test_an_answer_is_generated_by_texts_gate(moiie):
    model, (ids, pixels) = load(moiie.folder), samples()
    chosen = []
    gate = model.model.language_model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, _, output: chosen.append((module.modality_ids, output[2])))
    inputs = dict(input_ids=ids[:2], attention_mask=torch.ones_like(ids[:2]), pixel_values=pixels)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    (prompt, _), *steps = chosen
    assert prompt.tolist() == (ids[:2] == IMAGE).long().tolist() and len(steps) == 3
    for modalities, experts in steps:
        assert modalities.tolist() == [[0], [0]] and experts.max() < 3, "expert 3 is vision's"


@torch.no_grad()
def test_a_model_with_gates_compiles_without_graph_breaks(moiie):
    model, (ids, _) = load(moiie.folder), samples()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_gates_are_loaded_in_the_precision_of_the_text_models_own(kind, tmp_path):
    export(composite(GATES[kind][0]), tmp_path, GATED)
    model = load(tmp_path, dtype=torch.bfloat16)
    gates = [module for module in model.modules() if hasattr(module, "modality_weight_1")]
    assert gates and all(gate.modality_weight_1.dtype == gate.weight.dtype for gate in gates)
    assert (gates[-1].weight.dtype == torch.float32) == (kind == "deepseek_v3")


@torch.no_grad()
def test_gates_that_a_checkpoint_lacks_start_as_the_text_models_own_and_are_reported(tmp_path):
    tensors = export(composite(GATES["mixtral"][0]), tmp_path, GATED)
    plain = {name: tensor for name, tensor in tensors.items() if "modality_weight_1" not in name}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    gates = [f"model.language_model.layers.{layer}.mlp.gate" for layer in (0, 1)]
    assert report["missing_keys"] == {f"{gate}.modality_weight_1" for gate in gates}
    for gate in map(model.get_submodule, gates):
        assert torch.equal(gate.modality_weight_1, gate.weight)
