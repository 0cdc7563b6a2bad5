# SPDX-License-Identifier: Apache-2.0
"""Tests that rows that pad the vocabulary have no effect on losses, gradients and answers."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smar.model.layers.parallel_block import add_output_bias
from megatron_smar.model.vocabulary import mask_padding
from tests.launch import run

TOKENS, PADDED, HIDDEN, ROWS = 21, 32, 8, 6


def compare_with_one_process(dtype: torch.dtype, with_bias: bool, weight_is_shared: bool = False) -> None:
    """Compares a padded output layer over all ranks with a float64 reference without padding; every rank asserts."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    group = ProcessGroupCollection.use_mpu_process_groups().tp
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(PADDED, generator=generator, dtype=torch.float64)
    full[TOKENS:] *= 50  # the values of the padding must have no effect
    inputs = torch.randn(ROWS, 1, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(TOKENS, (ROWS, 1), generator=generator)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, use_cpu_initialization=True)
    config.params_dtype = dtype
    layer = ColumnParallelLinear(
        HIDDEN, PADDED, config=config, init_method=torch.nn.init.zeros_, bias=False, tp_group=group,
        skip_weight_param_allocation=weight_is_shared,
    )  # fmt: skip
    share = slice(group.rank() * PADDED // group.size(), (group.rank() + 1) * PADDED // group.size())
    if with_bias:
        add_output_bias(layer)
        layer.bias.data.copy_(bias[share])
    weight = torch.nn.Parameter(full[share].clone().to(dtype)) if weight_is_shared else layer.weight
    weight.data = full[share].clone().to(dtype)
    mask_padding(layer, TOKENS, PADDED, group)
    x = inputs.clone().to(dtype).requires_grad_()
    logits, _ = layer(x, weight=weight if weight_is_shared else None)
    loss = vocab_parallel_cross_entropy(logits.clone(), labels, tp_group=group).sum()
    loss.backward()

    y, reference = inputs.clone().requires_grad_(), full[:TOKENS].clone().requires_grad_()
    reference_bias = bias[:TOKENS].clone().requires_grad_()
    scores = y @ reference.t() + (reference_bias if with_bias else 0)
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    # Megatron computes the cross-entropy in float32, whatever the dtype of the logits.
    tolerance = dict(atol=1e-5 if dtype == torch.float64 else 2e-4, rtol=0, check_dtype=False)
    torch.testing.assert_close(loss, expected, **tolerance)
    torch.testing.assert_close(x.grad, y.grad, **tolerance)
    padded = torch.zeros_like(full)
    padded[:TOKENS] = reference.grad
    torch.testing.assert_close(weight.grad, padded[share], **tolerance)
    if with_bias:
        gradient = torch.zeros_like(bias)
        gradient[:TOKENS] = reference_bias.grad
        torch.testing.assert_close(layer.bias.grad, gradient[share], **tolerance)
    assert (logits[..., max(0, TOKENS - share.start) :] < -1e30).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("weight_is_shared", [False, True])
def test_loss_and_gradients_are_those_without_padding(single_rank, dtype, with_bias, weight_is_shared):
    compare_with_one_process(dtype, with_bias, weight_is_shared)


def test_loss_and_gradients_are_right_on_tensor_parallel_ranks_of_which_one_has_only_padding():
    """Uses four ranks with 8 rows each: the 21 tokens end on the third rank."""
    done = run("tests/unit/model/test_vocabulary.py", ranks=4, timeout=120)
    assert done.stdout.count("equal") == 4


def test_the_most_likely_token_is_never_padding(single_rank):
    from megatron.core.process_groups_config import ProcessGroupCollection

    group = ProcessGroupCollection.use_mpu_process_groups().tp
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, use_cpu_initialization=True)
    layer = ColumnParallelLinear(
        HIDDEN, PADDED, config=config, init_method=torch.nn.init.normal_, bias=False, tp_group=group
    )
    layer.weight.data[TOKENS:] = layer.weight.data[TOKENS - 1] * 9
    mask_padding(layer, TOKENS, PADDED, group)
    with torch.no_grad():
        logits, _ = layer(torch.randn(50, 2, HIDDEN))
    assert logits.argmax(-1).max() < TOKENS and logits.softmax(-1)[..., TOKENS:].sum() == 0


if __name__ == "__main__":
    from megatron_smar import runtime

    runtime.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo" if runtime.device() == "cpu" else "nccl")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    for kind in (torch.float64, torch.float32):
        for has_bias in (False, True):
            compare_with_one_process(kind, has_bias)
    print("equal", flush=True)
