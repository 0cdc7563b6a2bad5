# SPDX-License-Identifier: Apache-2.0
"""Small real models shared by the tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Arguments of TransformerConfig that all small mixtures share.
MIXTURE: dict[str, Any] = dict(
    num_moe_experts=4,
    moe_token_dispatcher_type="alltoall",
    moe_router_load_balancing_type="none",
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    add_bias_linear=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    transformer_impl="local",
    use_cpu_initialization=True,
    bias_dropout_fusion=False,
    persist_layer_norm=False,
)


def transformer_config(**changes: Any) -> Any:
    """Returns a Mixtral-like TransformerConfig: 3 layers, 4 experts, top-2, grouped queries."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    settings = MIXTURE | dict(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=96,
        moe_ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        moe_router_topk=2,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
    )
    kind = MLATransformerConfig if changes.get("multi_latent_attention") else TransformerConfig
    return kind(**(settings | changes))


def build_model(
    vision_path: str,
    connector: str = "mlp2x_gelu",
    routing: dict[str, Any] | None = None,
    freeze: frozenset[str] = frozenset({"vision"}),
    skips_unused: bool = False,
    **config: Any,
) -> Any:
    """Builds a VisionLanguageModel with a vocabulary of 128 and 32 px tiles; needs initialized parallel state."""
    from megatron_smar.model.layers.specs import LayerConfig
    from megatron_smar.model.vision import VisionConfig
    from megatron_smar.model.vlm import LanguageConfig, VisionLanguageModel
    from megatron_smar.routing.config import ModalityRoutingConfig
    from megatron_smar.routing.strategies import STRATEGIES

    strategy = dict(routing or {})
    common = {name: strategy.pop(name) for name in ("eps", "scope", "router_bias") if name in strategy}
    return VisionLanguageModel(
        transformer_config(**config),
        LanguageConfig(vocab_size=128, max_sequence_length=256, layers=LayerConfig(skips_unused=skips_unused)),
        VisionConfig(vision_path, image_size=32),
        connector,  # type: ignore[arg-type]
        ModalityRoutingConfig(STRATEGIES[strategy.pop("strategy", "none")](**strategy), **common),
        freeze=freeze,
    )


def router_of(strategy: Any, images: tuple[str, ...] = ("vision",), **config: Any) -> Any:
    """Builds a router in float64 with a strategy's config, or None for none; needs initialized parallel state."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.modalities import Modalities
    from megatron_smar.routing.config import ModalityRoutingConfig
    from megatron_smar.routing.router import ModalityAwareRouter

    router = ModalityAwareRouter(
        transformer_config(**config),
        ProcessGroupCollection.use_mpu_process_groups(),
        modality_routing=ModalityRoutingConfig(*([strategy] if strategy else []), modalities=Modalities(images)),
    )
    router.set_layer_number(1)
    return router.double()


def route(router: Any, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Runs a router; returns its probabilities and routing map, [s, b, E] each, and the reduced statistics."""
    probs, chosen = router(inputs, mask)
    return probs.view(*mask.shape[:2], -1), chosen.view(*mask.shape[:2], -1), router._pending.wait()[0]


def smar_of_layer(statistics: Any, top_k: int, eps: float, d_min: float, d_max: float) -> tuple[Any, Any, Any]:
    """Returns a layer's MRD distance, its SMAR loss, and whether they are defined, computed as in the router."""
    from megatron_smar.routing.closed_form import distance_in_few_operations
    from megatron_smar.routing.strategies import RoutedLayer
    from megatron_smar.routing.strategies.base import LayerRouting
    from megatron_smar.routing.strategies.smar import SMAR_LOSS, SmarConfig

    distance, comparable = distance_in_few_operations(statistics, top_k, eps)
    modalities, experts = statistics.counts.shape
    layer = RoutedLayer(experts, top_k, 1, tuple(map(str, range(modalities))))
    strategy = SmarConfig(d_min=d_min, d_max=d_max).build(layer)
    loss = strategy.losses(LayerRouting(1, 0, statistics, {}, distance, comparable))[SMAR_LOSS]
    return distance, loss.value, comparable


def save_tower(folder: Path) -> str:
    """Saves a vision tower, an InternViT with one layer for tiles of 32 px, and returns its folder."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    InternVLVisionModel(InternVLVisionConfig(**sizes, image_size=[32, 32], patch_size=[8, 8])).save_pretrained(folder)
    return str(folder)


def build_hf_model(image_token_id: int) -> Any:
    """Builds Hugging Face's model of the same sizes, randomly initialized, with norms and scales different from 1."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, MixtralConfig

    torch.manual_seed(0)
    vision = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[32, 32],
        patch_size=[8, 8],
    )
    text = MixtralConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def copy_weights(hf: Any, model: Any) -> None:
    """Copies connector and language model weights of a Hugging Face model to this project's model (one rank)."""
    theirs = dict(hf.named_parameters())
    used = {name for name in theirs if "vision_tower" in name}

    def take(name: str) -> Tensor:
        used.add(name)
        return theirs[name].data

    def copy(target: Tensor, source: Tensor) -> None:
        target.data.copy_(source)

    projector = "model.multi_modal_projector"
    for ours, name in (("norm", "layer_norm"), ("linear_1", "linear_1"), ("linear_2", "linear_2")):
        for kind in ("weight", "bias"):
            copy(getattr(getattr(model.connector, ours), kind), take(f"{projector}.{name}.{kind}"))
    language, gpt = "model.language_model", model.language_model
    copy(gpt.embedding.word_embeddings.weight, take(f"{language}.embed_tokens.weight"))
    copy(gpt.decoder.final_layernorm.weight, take(f"{language}.norm.weight"))
    copy(gpt.output_layer.weight, take("lm_head.weight"))
    groups = gpt.config.num_query_groups
    for index, layer in enumerate(gpt.decoder.layers):
        prefix = f"{language}.layers.{index}"
        copy(layer.input_layernorm.weight, take(f"{prefix}.input_layernorm.weight"))
        copy(layer.pre_mlp_layernorm.weight, take(f"{prefix}.post_attention_layernorm.weight"))
        # Megatron stores each group's queries, key and value together.
        qkv = [take(f"{prefix}.self_attn.{x}_proj.weight").unflatten(0, (groups, -1)) for x in "qkv"]
        copy(layer.self_attention.linear_qkv.weight, torch.cat(qkv, dim=1).flatten(0, 1))
        copy(layer.self_attention.linear_proj.weight, take(f"{prefix}.self_attn.o_proj.weight"))
        copy(layer.mlp.router.weight, take(f"{prefix}.mlp.gate.weight"))
        gate_up, down = take(f"{prefix}.mlp.experts.gate_up_proj"), take(f"{prefix}.mlp.experts.down_proj")
        for number, expert in enumerate(layer.mlp.experts.local_experts):
            copy(expert.linear_fc1.weight, gate_up[number])
            copy(expert.linear_fc2.weight, down[number])
    assert used == set(theirs), f"weights that were not copied: {sorted(set(theirs) - used)}"


def prepare(ids: Tensor, padding: Tensor, pixels: Tensor, image_token_id: int) -> dict[str, Tensor]:
    """Returns the model's inputs for token ids [b, s], prepared as in training."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.data.batch import VisionLanguageBatch
    from megatron_smar.training.batch import prepare_batch

    batch = VisionLanguageBatch(
        __key__=[str(i) for i in range(len(ids))],
        __restore_key__=(),
        input_ids=ids,
        labels=ids,
        loss_mask=torch.ones_like(ids, dtype=torch.float32),
        padding_mask=padding,
        pixel_values=pixels,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tokens = 4 if len(pixels) else 0
    inputs = vars(prepare_batch(batch, [image_token_id], tokens, True, groups))
    loss_inputs = (
        "labels",
        "loss_mask",
        "loss_positions",
        "shares",
        "step_tokens",
        "context_tokens",
        "loss_weights",
        "step_weight",
    )
    return {name: value for name, value in inputs.items() if name not in (*loss_inputs, "samples")}


def write_language(folder: Path) -> Path:
    """Writes a small random Llama with a tokenizer of the chatml kind; returns the folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [(Path(__file__).resolve().parents[1] / "LICENSE").read_text()],
        vocab_size=500,
        special_tokens=ends,
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token=ends[1], eos_token=ends[2], unk_token=ends[0], pad_token=ends[2]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
