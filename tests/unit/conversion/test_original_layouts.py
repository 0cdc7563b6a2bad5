# SPDX-License-Identifier: Apache-2.0
"""The original layouts of VITA, InternVL and InternViT, compared with a forward pass written from their descriptions.

The test folders look like the published ones, with their config.json, and random weights under their names. `Tower`
and `Original` below compute what the published code computes, without any class of transformers' InternVL.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIDE, PATCH, HIDDEN, TOWER_LAYERS, TOWER_HEADS, LANGUAGE_HIDDEN = 32, 8, 32, 3, 4, 48
VOCABULARY = 70  # the tokenizer has 64 tokens, so the three image tokens use existing rows
# The config of InternViT-300M-448px with smaller sizes.
TOWER: dict[str, Any] = {
    "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
    "drop_path_rate": 0.1,
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "image_size": SIDE,
    "initializer_factor": 0.1,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "norm_type": "layer_norm",
    "num_attention_heads": TOWER_HEADS,
    "num_hidden_layers": TOWER_LAYERS,
    "num_routed_experts": 4,
    "patch_size": PATCH,
    "qk_normalization": False,
    "qkv_bias": True,
}
SIX_BILLION = {"qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm"}
SHAPE: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": LANGUAGE_HIDDEN,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}
MIXTRAL = SHAPE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = SHAPE | {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
VITA = MIXTRAL | {
    "architectures": ["VITAMixtralForCausalLM"],
    "model_type": "vita-mixtral",
    "freeze_audio_encoder": True,
    "image_aspect_ratio": "square",
    "mm_audio_encoder": "audio-encoder-2wh_zh_en_audioset_Mixtral-8x7B_New-base-tunning",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "InternViT-300M-448px",
    "tokenizer_model_max_length": 6200,
    "use_mm_proj": True,
}
INTERNVL: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": SIDE,
    "llm_config": QWEN3_MOE,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "ps_version": "v2",
    "select_layer": -1,
    "use_thumbnail": True,
    "vision_config": TOWER,
}


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + eps) times a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Block(nn.Module):
    """One layer of InternViT: pre-norm, one matrix for queries, keys and values, a layer scale on both branches."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, eps = config["hidden_size"], config["layer_norm_eps"]
        norm = nn.LayerNorm if config["norm_type"] == "layer_norm" else RMSNorm
        self.heads = config["num_attention_heads"]
        self.norm1, self.norm2 = norm(size, eps=eps), norm(size, eps=eps)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(size, 3 * size, bias=config["qkv_bias"])
        self.attn.proj = nn.Linear(size, size)
        if config["qk_normalization"]:
            self.attn.q_norm, self.attn.k_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(size, config["intermediate_size"])
        self.mlp.fc2 = nn.Linear(config["intermediate_size"], size)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.attn.qkv(x).chunk(3, dim=-1)
        if hasattr(self.attn, "q_norm"):  # over all heads together
            query, key = self.attn.q_norm(query), self.attn.k_norm(key)
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (query, key, value))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return self.attn.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attend(self.norm1(x))
        return x + self.ls2 * self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Tower(nn.Module):
    """InternViT under its original names; no norm after the last layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, patch = config["hidden_size"], config["patch_size"]
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, size))
        self.embeddings.patch_embedding = nn.Conv2d(3, size, patch, stride=patch)
        patches = (config["image_size"] // patch) ** 2
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, size))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns the hidden states [n, 1 + patches, size] before the first layer and after each one.

        Args:
            pixels: Tiles [n, 3, side, side].
        """
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(pixels), -1, -1)
        hidden = [torch.cat([first, patches], dim=1) + self.embeddings.position_embedding]
        for layer in self.encoder.layers:
            hidden.append(layer(hidden[-1]))
        return hidden


def shuffled(features: Tensor) -> Tensor:
    """Pixel shuffle from [n, patches, c] to [n, patches / 4, 4 c], as both published codes do it."""
    n, patches, c = features.shape
    side = int(patches**0.5)
    x = features.view(n, side, side // 2, 2 * c).transpose(1, 2).contiguous()
    return x.view(n, side // 2, side // 2, 4 * c).transpose(1, 2).reshape(n, patches // 4, 4 * c)


class Original(nn.Module):
    """Tower, projection and language model; the image placeholders' embeddings are filled with features in order."""

    def __init__(self, tower: dict[str, Any], text: dict[str, Any], norm: bool, scale: float, layer: int = -1) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        super().__init__()
        self.tower, self.scale, self.layer = Tower(tower), scale, layer
        projection = [nn.Linear(4 * HIDDEN, LANGUAGE_HIDDEN), nn.GELU(), nn.Linear(LANGUAGE_HIDDEN, LANGUAGE_HIDDEN)]
        self.projection = nn.Sequential(*([nn.LayerNorm(4 * HIDDEN)] if norm else []), *projection)
        self.language = AutoModelForCausalLM.from_config(CONFIG_MAPPING[text["model_type"]].from_dict(dict(text)))
        self.float().eval()

    def features(self, pixels: Tensor) -> Tensor:
        return self.projection(shuffled(self.tower(pixels)[self.layer][:, 1:] * self.scale))

    def forward(self, ids: Tensor, pixels: Tensor, image_token_id: int) -> Tensor:
        embeddings = self.language.get_input_embeddings()(ids.clamp(max=VOCABULARY - 1)).clone()
        embeddings[ids == image_token_id] = self.features(pixels).flatten(0, 1)
        return self.language(inputs_embeds=embeddings).logits


def randomise(module: nn.Module) -> None:
    """Sets random weights that all affect the output: norms and scales around one, biases away from zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            vector = tensor.dim() == 1 and not name.endswith("bias")
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (1.0 if vector else 0.0))


def language_weights(language: Any, folder: Path) -> dict[str, Tensor]:
    """Returns a language model's weights by their names on disk."""
    from safetensors.torch import load_file

    language.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: bool = True) -> Path:
    """Writes a folder like a published one, with code that must not run."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    if tokenizer:
        words = {f"w{number}": number for number in range(62)} | {"<unk>": 62, "</s>": 63}
        built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        built.pre_tokenizer = pre_tokenizers.Whitespace()
        wrapped = PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", eos_token="</s>")
        wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_internvl_chat", "configuration_intern_vit"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the folder was run')\n")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return folder


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def write_vita(root: Path, tower_inside: bool = True, text: dict[str, Any] = MIXTRAL, **changes: Any) -> Original:
    """Writes a VITA model in its published layout to root / "vita", and its vision tower to root / "vit"."""
    torch.manual_seed(0)
    original = Original(TOWER, text, norm=False, scale=0.5)
    randomise(original)
    tower = original.tower.state_dict()
    weights = language_weights(original.language, root / "language") | prefixed(
        original.projection.state_dict(), "model.mm_projector."
    )
    weights["model.audio_encoder.encoder.enc.1.after_norm.weight"] = torch.ones(4)
    if tower_inside:
        weights |= prefixed(tower, "model.vision_tower.vision_tower.")
        tower = {name: torch.zeros_like(tensor) for name, tensor in tower.items()}  # must not be used
    write(root / "vita", VITA | text | {"model_type": "vita-mixtral"} | changes, weights)
    write(root / "vit", TOWER, tower, tokenizer=False)
    return original


def write_internvl(root: Path, tower: dict[str, Any] = TOWER, **changes: Any) -> Original:
    """Writes an InternVL model in OpenGVLab's layout to root / "internvl"."""
    torch.manual_seed(0)
    config = INTERNVL | {"vision_config": tower} | changes
    original = Original(tower, config["llm_config"], norm=True, scale=1.0, layer=config["select_layer"])
    randomise(original)
    weights = (
        prefixed(language_weights(original.language, root / "language"), "language_model.")
        | prefixed(original.tower.state_dict(), "vision_model.")
        | prefixed(original.projection.state_dict(), "mlp1.")
    )
    write(root / "internvl", config, weights)
    return original


def read(root: Path, name: str, vision: str | None = None) -> Any:
    from megatron_smar.conversion.sources import read_composite

    (root / "scratch").mkdir(exist_ok=True)
    return read_composite(root / name, root / vision if vision else None, root / "scratch")


def trained(source: Any, output: Path) -> Any:
    """Imports a source, and returns the trainer's model with the checkpoint's weights."""
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.config.build import language_config, modality_routing_config, transformer_config, vision_config
    from megatron_smar.conversion.empty_model import parse
    from megatron_smar.conversion.importer import write_model
    from megatron_smar.model.vlm import VisionLanguageModel

    write_model(source, output)
    argv = [*(output / "flags.txt").read_text().split(), "--vision-model", str(output / "hf"), "--load", str(output)]
    args = parse(argv, source.config.text_config.vocab_size)
    model = VisionLanguageModel(
        transformer_config(args),
        language_config(args),
        vision_config(args),
        args.connector,
        modality_routing_config(args),
        freeze=frozenset(),
    ).eval()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    loaded = dist_checkpointing.load(dict(state), str(output / "release"))
    model.load_state_dict({name: loaded[name] for name in state})  # without the run's arguments
    return model


def inputs(image_token_id: int) -> tuple[Tensor, Tensor]:
    """Returns token ids [2, s] with two tiles' placeholders in the second row, and the tiles."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 62, (2, 16), generator=generator)
    ids[1, 3:7] = ids[1, 9:13] = image_token_id
    return ids, torch.randn(2, 3, SIDE, SIDE, generator=generator)


@torch.no_grad()
def compare(source: Any, original: Original, output: Path) -> Any:
    """Compares features and logits of the trainer's model and the original; returns the trainer's model."""
    from tests.models import prepare

    model = trained(source, output)
    ids, pixels = inputs(source.config.image_token_id)
    expected = original.features(pixels)
    torch.testing.assert_close(model.connector(model.vision_model(pixels)), expected, atol=1e-5, rtol=0)
    prepared = prepare(ids, torch.zeros_like(ids, dtype=torch.bool), pixels, source.config.image_token_id)
    logits = original(ids, pixels, source.config.image_token_id)
    torch.testing.assert_close(model(**prepared), logits, atol=1e-5, rtol=0)
    assert expected.std() > 0.1 and logits.std() > 0.3, "values near zero would agree whatever is computed"
    return model


@pytest.mark.parametrize("tower_inside", [True, False])
def test_an_imported_vita_computes_what_vita_computes(tower_inside, single_rank, tmp_path, capsys):
    original = write_vita(tmp_path, tower_inside)
    source = read(tmp_path, "vita", "vit")
    compare(source, original, tmp_path / "out")
    assert "1 weights model.audio_encoder.* are left out" in capsys.readouterr().out
    flags = (tmp_path / "out" / "flags.txt").read_text().splitlines()
    wanted = "--connector mlp2x_gelu|--vision-feature-scale 0.5|--min-tiles 1|--max-tiles 12|--use-thumbnail"
    assert set(wanted.split("|")) <= set(flags)
    saved = json.loads((tmp_path / "out" / "hf" / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == [0.4] * 3


def test_an_imported_vita_with_qwen2_computes_what_vita_computes(single_rank, tmp_path):
    original = write_vita(tmp_path, text=SHAPE | {"model_type": "qwen2"}, model_type="vita-Qwen2")
    compare(read(tmp_path, "vita", "vit"), original, tmp_path / "out")


def test_vitas_vocabulary_grows_if_it_has_no_rows_for_the_image_tokens(single_rank, tmp_path):
    original = write_vita(tmp_path, text=MIXTRAL | {"vocab_size": 64})
    source = read(tmp_path, "vita", "vit")
    assert source.config.text_config.vocab_size == 67 and source.config.image_token_id == 66
    model = trained(source, tmp_path / "out")
    embedding = original.language.get_input_embeddings().weight
    found = model.language_model.embedding.word_embeddings.weight
    torch.testing.assert_close(found, torch.cat([embedding, embedding.mean(dim=0).expand(3, -1)]))


@pytest.mark.parametrize(("tower", "select_layer"), [(TOWER, -1), (TOWER, -2), (TOWER | SIX_BILLION, -1)])
def test_an_imported_original_internvl_computes_what_its_code_computes(
    tower, select_layer, single_rank, tmp_path, capsys
):
    original = write_internvl(tmp_path, tower, select_layer=select_layer)
    source = read(tmp_path, "internvl")
    assert "custom code" not in capsys.readouterr().out, "transformers offered to run code of the folder"
    compare(source, original, tmp_path / "out")
    assert {"--max-tiles 6", "--use-thumbnail"} <= set((tmp_path / "out" / "flags.txt").read_text().splitlines())
    assert source.config.model_type == "internvl", "a plain transformers class should be sufficient"


def test_an_export_of_vita_computes_the_same_in_internvls_layout(single_rank, tmp_path):
    from transformers import AutoModelForImageTextToText

    from megatron_smar import huggingface
    from megatron_smar.conversion.exporter import export_model
    from megatron_smar.conversion.importer import write_model

    original = write_vita(tmp_path)
    source = read(tmp_path, "vita", "vit")
    write_model(source, tmp_path / "out")
    export_model(tmp_path / "out", tmp_path / "out" / "hf", tmp_path / "exported", processor=False)
    huggingface.register()
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", dtype="float32").eval()
    ids, pixels = inputs(source.config.image_token_id)
    with torch.no_grad():
        expected = original(ids, pixels, source.config.image_token_id)
        torch.testing.assert_close(exported(input_ids=ids, pixel_values=pixels).logits, expected, atol=1e-5, rtol=0)


def test_a_dense_internvl_is_upcycled_from_its_original_layout(single_rank, tmp_path):
    from megatron_smar.conversion.upcycle import UpcyclingConfig, upcycled

    original = write_internvl(tmp_path, llm_config=QWEN3_MOE | {"model_type": "qwen3"})
    model = compare(upcycled(read(tmp_path, "internvl"), UpcyclingConfig()), original, tmp_path / "out")
    assert len(model.language_model.decoder.layers[0].mlp.experts.local_experts) == 4


@pytest.mark.parametrize("folder", ["vit", "internvl"])
def test_an_original_internvit_combined_with_a_language_model_has_its_features(folder, single_rank, tmp_path):
    from megatron_smar.conversion.composite import Connection
    from megatron_smar.conversion.sources import read_parts

    tower = TOWER | SIX_BILLION
    original = write_internvl(tmp_path, tower)
    write(tmp_path / "vit", tower, original.tower.state_dict(), tokenizer=False)
    connection = Connection(pixel_shuffle=0.5)
    language = tmp_path / "language"
    source = read_parts(language, tmp_path / folder, connection, tmp_path / "internvl", tmp_path / "scratch")
    model = trained(source, tmp_path / "out")
    _, pixels = inputs(0)
    with torch.no_grad():
        expected = shuffled(original.tower(pixels)[-1][:, 1:])
        torch.testing.assert_close(model.vision_model(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("stored", "tied"), [(True, False), (False, True)])
def test_a_stored_output_layer_is_untied_whatever_config_json_says(stored, tied, tmp_path):
    write_internvl(tmp_path, llm_config=QWEN3_MOE | {"tie_word_embeddings": True})
    rewrite(tmp_path / "internvl", lambda weights: keep_output_layer(weights, stored))
    source = read(tmp_path, "internvl")
    assert source.config.tie_word_embeddings is tied
    assert source.flags["untie-embeddings-and-output-weights"] is not tied


def keep_output_layer(weights: dict[str, Tensor], stored: bool) -> None:
    weights.pop("language_model.lm_head.weight", None)
    if stored:
        weights["language_model.lm_head.weight"] = torch.ones(VOCABULARY, LANGUAGE_HIDDEN)


def rewrite(folder: Path, change: Any) -> None:
    """Applies a change to the weights of a folder."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def damage(weights: dict[str, Tensor]) -> None:
    prefix = "model.vision_tower.vision_tower."
    weights[prefix + "head.weight"] = torch.ones(1)
    del weights[prefix + "encoder.layers.1.attn.qkv.bias"], weights["model.mm_projector.2.bias"]


def test_missing_and_unexpected_weights_are_listed_by_their_original_names(tmp_path):
    from megatron_smar.conversion.importer import write_model

    write_vita(tmp_path)
    rewrite(tmp_path / "vita", damage)
    with pytest.raises(ValueError) as error:
        write_model(read(tmp_path, "vita", "vit"), tmp_path / "out")
    missing = "model.mm_projector.2.bias, model.vision_tower.vision_tower.encoder.layers.1.attn.qkv.bias"
    assert f"2 missing: {missing}; 1 unexpected: model.vision_tower.vision_tower.head.weight" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_fused_qkv_tensor_of_another_size_is_named(single_rank, tmp_path):
    from megatron_smar.conversion.importer import write_model

    rows = 2 * HIDDEN
    name = "vision_model.encoder.layers.2.attn.qkv.weight"
    write_internvl(tmp_path)
    rewrite(tmp_path / "internvl", lambda weights: weights.update({name: torch.ones(rows, HIDDEN)}))
    with pytest.raises(ValueError, match=rf"{name} is \[{rows}, {HIDDEN}\], not \[{3 * HIDDEN}, {HIDDEN}\]"):
        write_model(read(tmp_path, "internvl"), tmp_path / "out")


UNSUPPORTED = [
    ("vita", None, {}, "whose config.json only names its vision tower ('InternViT-300M-448px'); give that model's"),
    ("vita", "vit", {"mm_projector_type": "ldp"}, "mm_projector_type is 'ldp'"),
    ("vita", "vit", {"mm_vision_tower": "siglip-so400m"}, "mm_vision_tower is 'siglip-so400m'"),
    ("vita", "vit", {"hidden_size": "many"}, "transformers cannot read the config of this model's language model"),
    ("internvl", "vit", {}, "has its vision tower in it; leave --vision out"),
    ("internvl", None, {"ps_version": "v1"}, "ps_version is 'v1'"),
    ("internvl", None, {"force_image_size": 2 * SIDE}, "force_image_size is 64"),
    ("internvl", None, {"llm_config": {"model_type": "internlm2"}}, "the language model's type is 'internlm2'"),
    ("internvl", None, {"vision_config": TOWER | SIX_BILLION | {"layer_norm_eps": 1e-5}}, "layer_norm_eps is 1e-05"),
    (
        "internvl",
        None,
        {"vision_config": TOWER | {"hidden_size": "x"}},
        "cannot read the config of this model's vision",
    ),
]


@pytest.mark.parametrize(("name", "vision", "changes", "sentence"), UNSUPPORTED)
def test_a_setting_without_a_counterpart_is_refused_in_one_sentence(name, vision, changes, sentence, tmp_path):
    for folder, config in (("vita", VITA), ("internvl", INTERNVL), ("vit", TOWER)):
        write(tmp_path / folder, config | (changes if folder == name else {}), {"a": torch.ones(1)}, tokenizer=False)
    with pytest.raises(ValueError) as error:
        read(tmp_path, name, vision)
    assert sentence in str(error.value) and str(error.value).count(". ") == 0


def test_the_message_for_an_original_layout_says_what_to_give_instead(tmp_path):
    from megatron_smar.conversion import original_layouts
    from megatron_smar.conversion.composite import ORIGINAL_TYPES, load_config

    assert set(ORIGINAL_TYPES) == {*original_layouts.LAYOUTS, "intern_vit_6b"}
    for kind in ORIGINAL_TYPES:
        write(tmp_path / kind, {"model_type": kind}, {}, tokenizer=False)
        with pytest.raises(ValueError, match="give the import's hf/, or an export"):
            load_config(tmp_path / kind)
