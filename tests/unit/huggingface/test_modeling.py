# SPDX-License-Identifier: Apache-2.0
"""The modeling code of an export computes what the trainer computes, using transformers only."""

import ast
import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    InternVLVisionConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from megatron_smar import huggingface
from megatron_smar.huggingface import (
    RemoteFields,
    modeling_modality_aware,
    needs_remote_code,
    plain_config,
    write_remote_code,
)
from tests.unit.huggingface.exports import (
    BIASED,
    EXPERTS,
    FIELDS,
    GATED,
    GATES,
    GROUPED,
    IMAGE,
    SIDE,
    VISION,
    Trainer,
    composite,
    export,
    load,
    samples,
)


@pytest.fixture(scope="module")
def trainer(single_rank, tmp_path_factory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def exported(trainer) -> Any:
    return load(trainer.folder)


@torch.no_grad()
def test_logits_of_text_and_images_equal_the_trainers(trainer, exported):
    ids, pixels = samples()
    expected, plain = trainer.logits(ids, pixels), trainer.plain(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(exported(input_ids=ids, pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).abs().amax((1, 2)).min() > 0.01, "the biases have no effect, so they were not compared"


@torch.no_grad()
def test_text_without_images_gets_the_text_bias(trainer, exported):
    ids, _ = samples()
    none = torch.zeros(0, 3, SIDE, SIDE)
    torch.testing.assert_close(exported(input_ids=ids[2:]).logits, trainer.logits(ids[2:], none), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_zero_biases_give_exactly_the_plain_models_logits(trainer, exported):
    ids, pixels = samples()
    kept = {name: parameter for name, parameter in exported.named_parameters() if "modality_bias" in name}
    values = {name: parameter.clone() for name, parameter in kept.items()}
    for parameter in kept.values():
        parameter.zero_()
    logits = exported(input_ids=ids, pixel_values=pixels).logits
    for name, parameter in kept.items():
        parameter.copy_(values[name])
    assert torch.equal(logits, trainer.plain(input_ids=ids, pixel_values=pixels).logits)


def test_greedy_generation_equals_the_trainers_argmax(trainer, exported):
    ids, pixels = samples()
    settings = dict(max_new_tokens=6, do_sample=False)
    seen = exported.generate(
        input_ids=ids[:2], attention_mask=torch.ones_like(ids[:2]), pixel_values=pixels, **settings
    )
    assert seen[:, ids.shape[1] :].tolist() == trainer.continuation(ids[:2], pixels, 6).tolist()
    read = exported.generate(input_ids=ids[2:], attention_mask=torch.ones_like(ids[2:]), **settings)
    assert read[:, ids.shape[1] :].tolist() == trainer.continuation(ids[2:], pixels[:0], 6).tolist()


def test_left_padding_does_not_change_answers(trainer, exported):
    ids, pixels = samples()
    short = ids[1:2, 7:]
    batch = torch.cat([ids[:1], torch.nn.functional.pad(short, (7, 0), value=0)])
    mask = (batch != 0).long()
    tokens = exported.generate(
        input_ids=batch, attention_mask=mask, pixel_values=pixels, max_new_tokens=6, do_sample=False
    )
    unpadded = [trainer.continuation(ids[:1], pixels[:2], 6), trainer.continuation(short, pixels[2:], 6)]
    assert tokens[:, ids.shape[1] :].tolist() == torch.cat(unpadded).tolist()


@torch.no_grad()
def test_embeddings_need_modality_ids_and_then_give_the_same_result(exported):
    ids, pixels = samples()
    ids, embeddings = ids[:2], exported.get_input_embeddings()(ids[:2])
    modalities = (ids == IMAGE).long()
    with pytest.raises(ValueError, match=r"with inputs_embeds \[b, s, h\] also mm_token_type_ids"):
        exported(inputs_embeds=embeddings, pixel_values=pixels)
    logits = exported(inputs_embeds=embeddings, pixel_values=pixels, mm_token_type_ids=modalities).logits
    assert torch.equal(logits, exported(input_ids=ids, pixel_values=pixels).logits)
    settings = dict(attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=4, do_sample=False)
    tokens = exported.generate(inputs_embeds=embeddings, mm_token_type_ids=modalities, **settings)
    assert tokens.tolist() == exported.generate(input_ids=ids, **settings)[:, ids.shape[1] :].tolist()


@torch.no_grad()
def test_the_model_compiles_without_graph_breaks_and_gives_the_same_result(exported):
    ids, _ = samples()  # placeholders route as vision even without images, which avoids compiling the tower
    compiled = torch.compile(exported, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, exported(input_ids=ids).logits)


def test_a_recomputed_layer_gets_the_modalities_of_its_own_batch(trainer):
    ids, pixels = samples()
    gradients = []
    for recompute in (False, True):
        model = load(trainer.folder).train()
        if recompute:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.square().mean()
        model(
            input_ids=ids[[1, 2, 0]], pixel_values=pixels[[2, 0, 1]], use_cache=False
        )  # a second forward pass before the first one's backward pass
        loss.backward()
        gradients.append([gate.grad for name, gate in model.named_parameters() if "modality_bias" in name])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("fields", [BIASED, GATED, replace(GATED, modality_router_bias=False)], ids=FIELDS)
@pytest.mark.parametrize("kind", GATES)
@torch.no_grad()
def test_each_kind_of_gate_routes_like_megatron_and_keeps_its_names(kind, fields, tmp_path):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    text, flags = GATES[kind]
    plain = composite(text)
    for name, tensor in plain.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.2, 0.2)
    tensors = export(plain, tmp_path / "first", fields)
    model = load(tmp_path / "first")
    gates = {name: module for name, module in model.named_modules() if hasattr(module, "modality_bias")}
    assert len(gates) == sum(name.endswith("gate.weight") for name in tensors) >= 1
    seen: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
    for name, gate in gates.items():
        gate.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].reshape(-1, 48), y)}))
    ids, pixels = samples()
    model(input_ids=ids, pixel_values=pixels)
    for name, gate in gates.items():
        hidden, (_, weights, chosen) = seen[name]
        layer = re.search(r"layers\.(\d+)", name)[1]
        here = {n.split(".gate.")[1]: t for n, t in tensors.items() if f"layers.{layer}." in n and ".gate." in n}
        modalities = (ids == IMAGE).long().flatten()
        own = torch.stack([here["weight"], here.get("modality_weight_1", here["weight"])])
        logits = torch.einsum("nh,neh->ne", hidden, own[modalities])
        logits += here.get("modality_bias", torch.zeros(2, EXPERTS))[modalities]
        expert_bias = getattr(gate, "e_score_correction_bias", None)
        expected, _ = topk_routing_with_score_function(logits, 2, expert_bias=expert_bias, **flags)
        actual = torch.zeros_like(expected).scatter(1, chosen, weights)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)

    model.save_pretrained(tmp_path / "second")
    again = load_file(tmp_path / "second/model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert (tmp_path / "second" / huggingface.CODE.name).read_bytes() == huggingface.CODE.read_bytes()
    logits = load(tmp_path / "second")(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(logits, model(input_ids=ids, pixel_values=pixels).logits)


def test_a_model_built_in_memory_is_saved_under_the_plain_names_with_its_code(trainer, tmp_path):
    """A loaded model is saved with the renaming it was loaded with; a new model has none yet, and no auto_map."""
    config = modeling_modality_aware.ModalityAwareInternVLConfig.from_pretrained(trainer.folder)
    del config.auto_map
    modeling_modality_aware.ModalityAwareInternVLForConditionalGeneration(config).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == trainer.tensors.keys()
    assert (tmp_path / huggingface.CODE.name).read_bytes() == huggingface.CODE.read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"].items() <= huggingface.AUTO_MAP.items()
    load(tmp_path)


def test_the_biases_are_stored_under_the_gates_names(trainer):
    names = {name for name in trainer.tensors if "bias" in name and "layers.1." in name}
    assert names == {"language_model.model.layers.1.block_sparse_moe.gate.modality_bias"}


@pytest.mark.parametrize("tower", ["internvl", "clip", "siglip"])
@pytest.mark.parametrize(
    ("connector", "shuffle", "scale", "layer"), [("mlp2x_gelu", 0.5, 0.5, -1), ("internvl", 1.0, 2.0, -2)]
)
@torch.no_grad()
def test_image_features_equal_the_trainers(tower, connector, shuffle, scale, layer, tmp_path):
    from megatron_smar.model.connector import Connector
    from megatron_smar.model.vision import VisionConfig, VisionEncoder

    kinds = {"internvl": InternVLVisionConfig, "clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    vision = kinds[tower](**VISION, image_size=SIDE, patch_size=8)
    changes = dict(
        vision_config=vision,
        downsample_ratio=shuffle,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
    )
    plain = composite(GATES["mixtral"][0], **changes)
    fields = RemoteFields(projector_layer_norm=connector == "internvl", vision_feature_scale=scale)
    assert needs_remote_code(plain.config.to_dict(), fields)
    tensors = export(plain, tmp_path / "export", fields)
    model = load(tmp_path / "export")

    plain.model.vision_tower.save_pretrained(tmp_path / "tower")
    encoder = VisionEncoder(VisionConfig(str(tmp_path / "tower"), SIDE, shuffle, layer, scale), torch.float32)
    projector = Connector(connector, encoder.output_size, 48, torch.float32)
    prefix = "multi_modal_projector."
    renamed = {
        name.removeprefix(prefix).replace("layer_norm", "norm"): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    projector.load_state_dict(renamed)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = projector(encoder(pixels))
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.001

    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == tensors.keys()


@torch.no_grad()
def test_biases_stay_in_float32_when_the_model_is_loaded_in_bfloat16(trainer, exported):
    model = load(trainer.folder, dtype=torch.bfloat16)
    kinds = {name.endswith("modality_bias"): parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    wanted = dict(exported.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in model.named_parameters() if n.endswith("modality_bias"))
    ids, pixels = samples()
    assert model(input_ids=ids, pixel_values=pixels).logits.dtype == torch.bfloat16


def test_biases_that_a_checkpoint_lacks_are_zero_and_reported(tmp_path):
    tensors = export(composite(GATES["mixtral"][0]), tmp_path, BIASED)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("modality_bias")}
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    missing = {f"model.language_model.layers.{layer}.mlp.gate.modality_bias" for layer in (0, 1)}
    assert report["missing_keys"] == missing
    assert all((model.get_parameter(name) == 0).all() for name in missing)


def test_a_text_model_with_unsupported_gates_is_refused(tmp_path):
    export(composite(LlamaConfig(**GROUPED)), tmp_path, BIASED)
    with pytest.raises(ValueError, match="the text model is 'llama'; the gates known here are those of mixtral"):
        load(tmp_path)


def test_the_export_does_not_load_without_trust_remote_code(trainer):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForImageTextToText.from_pretrained(trainer.folder, trust_remote_code=False)


def test_the_modeling_code_imports_only_torch_and_transformers():
    tree = ast.parse(huggingface.CODE.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names == {"torch", "transformers"}


@torch.no_grad()
def test_text_only_tools_can_load_the_same_model_as_a_causal_language_model(trainer, exported):
    model = AutoModelForCausalLM.from_pretrained(trainer.folder, trust_remote_code=True)
    ids, _ = samples()
    assert torch.equal(model(input_ids=ids[2:]).logits, exported(input_ids=ids[2:]).logits)


@torch.no_grad()
def test_the_base_model_loads_its_weights_too(trainer, exported):
    model, report = AutoModel.from_pretrained(trainer.folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert report["unexpected_keys"] <= {"lm_head.weight", "language_model.lm_head.weight"}
    ids, pixels = samples()
    hidden = model(input_ids=ids, pixel_values=pixels).last_hidden_state
    assert torch.equal(exported.lm_head(hidden), exported(input_ids=ids, pixel_values=pixels).logits)


def test_tokenizer_and_processor_load_without_trust_remote_code(trainer, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor, PreTrainedTokenizerFast

    special = ["<unk>", "<img>", "</img>", "<IMG_CONTEXT>"]
    words = models.WordLevel({word: index for index, word in enumerate(special)}, unk_token="<unk>")
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="<unk>", extra_special_tokens=named | {"video_token": "<unk>"}
    )
    processor = InternVLProcessor(GotOcr2ImageProcessor(), tokenizer, InternVLVideoProcessor())
    processor.save_pretrained(tmp_path)
    for name in ("config.json", huggingface.CODE.name):
        (tmp_path / name).write_bytes((trainer.folder / name).read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<IMG_CONTEXT>") == 3
    assert type(AutoProcessor.from_pretrained(tmp_path)) is InternVLProcessor


def test_plain_models_need_no_code_and_keep_their_config(tmp_path):
    config = json.loads(composite(GATES["mixtral"][0]).config.to_json_string(use_diff=False))
    assert not needs_remote_code(config, RemoteFields())
    assert needs_remote_code(config, BIASED)
    clip = config | {"vision_config": CLIPVisionConfig().to_dict()}
    assert needs_remote_code(clip, RemoteFields())
    written = write_remote_code(tmp_path, config, BIASED)
    assert plain_config(written) == config | {"architectures": ["InternVLForConditionalGeneration"]}
    with pytest.raises(ValueError, match="model_type 'llava'"):
        write_remote_code(tmp_path, config | {"model_type": "llava"}, BIASED)


def test_this_package_loads_an_export_with_its_own_code_instead_of_the_folders(trainer):
    huggingface.register()
    model = AutoModelForImageTextToText.from_pretrained(trainer.folder)
    assert type(model).__module__ == "megatron_smar.huggingface.modeling_modality_aware"
