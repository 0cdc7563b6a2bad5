# SPDX-License-Identifier: Apache-2.0
"""Tests of the positions that a context-parallel rank holds; tests/distributed compares attention across ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_smar.model.context_parallel import zigzag_positions


@given(st.integers(1, 5), st.integers(1, 6))
def test_a_rank_holds_its_chunk_and_the_chunk_at_the_same_distance_from_the_end(chunk, ranks):
    positions = zigzag_positions(2 * ranks * chunk, ranks)
    for rank, held in enumerate(positions.tolist()):
        first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
        assert held == [*range(first, first + chunk), *range(second, second + chunk)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_each_sequence_of_a_pack_is_split_separately(chunks, ranks):
    lengths = torch.tensor(chunks) * 2 * ranks
    starts = (lengths.cumsum(0) - lengths).tolist()
    separate = [zigzag_positions(length, ranks) + start for start, length in zip(starts, lengths.tolist(), strict=True)]
    assert torch.equal(zigzag_positions(lengths.tolist(), ranks), torch.cat(separate, dim=1))


class _Place:
    """The part of a process group that Megatron calls here."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_an_attention_mask_under_context_parallelism_is_refused(single_rank):
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_smar.model.layers.local_attention import ScaledDotProductAttention
    from tests.models import transformer_config

    attention = ScaledDotProductAttention(transformer_config(), 1, AttnMaskType.padding, "self")
    attention.cp_group = _Place(0, 2)
    with pytest.raises(ValueError, match="--context-parallel-size > 1"):
        attention._mask_of_shard(torch.zeros(8, 1, 1, 1), False, torch.zeros(1, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize("packed", [False, True])
def test_values_smaller_than_keys_store_all_scores_or_change_the_attention(single_rank, packed):
    """DeepSeek's latent attention: keys of 192 and values of 128 numbers."""
    from megatron.core.transformer.enums import AttnMaskType
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megatron_smar.model.layers.local_attention import ScaledDotProductAttention
    from tests.models import transformer_config

    attention = ScaledDotProductAttention(transformer_config(), 1, AttnMaskType.causal, "self", softmax_scale=0.3)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(16, 2, size, generator=generator, requires_grad=True) for size in (12, 12, 8))
    lengths = [5, 11] if packed else [16]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends) if packed else None
    inputs = (query, key, value) if packed else [x.unsqueeze(1) for x in (query, key, value)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fails where only the kernel with all scores can run
        output = attention(*inputs, None, packed_seq_params=params).reshape(16, 2, 8)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = torch.ones(16, 16).tril().bool() & (sequence[:, None] == sequence)
    scores = torch.einsum("snd,tnd->nst", query.double(), key.double()) * 0.3
    expected = torch.einsum("nst,tnd->snd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
    reference = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for found, wanted in zip(gradients, reference, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_rotation_for_a_pack_rotates_a_sequence_by_other_angles_than_its_own(single_rank, tmp_path):
    from megatron.core.transformer.attention import SelfAttention

    from megatron_smar.model.layers.local_attention import LocalSelfAttention
    from tests.models import build_model, save_tower

    model = build_model(save_tower(tmp_path))
    attention = model.language_model.decoder.layers[0].self_attention
    assert type(attention) is LocalSelfAttention
    ends = torch.tensor([0, 5, 6, 16], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=10, max_seqlen_kv=10)
    hidden = torch.randn(16, 1, 48, generator=torch.Generator().manual_seed(1))
    given = dict(rotary_pos_emb=model.language_model.rotary_pos_emb(10, packed_seq=True), packed_seq_params=packed)
    at_once, _ = attention(hidden, None, **given)
    one_by_one, _ = SelfAttention.forward(attention, hidden, None, **given)
    assert torch.equal(at_once, one_by_one)


def test_the_hook_that_waits_for_a_weight_runs_before_the_weight_is_used(single_rank, tmp_path):
    """--overlap-param-gather waits for weights in modules' forward pre-hooks; grouped experts call no such forward."""
    from tests.models import build_hf_model, build_model, prepare

    build_hf_model(image_token_id=5).model.vision_tower.save_pretrained(tmp_path)
    model = build_model(str(tmp_path))
    waited = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: waited.add(name))
    ids = torch.arange(6, 14).unsqueeze(0)
    ids[0, :4] = 5
    model(**prepare(ids, torch.zeros_like(ids, dtype=torch.bool), torch.ones(1, 3, 32, 32), 5))
    used = {name for name, part in model.named_modules() if any(p.requires_grad for p in part.parameters(False))}
    assert used <= waited, f"never waited for: {sorted(used - waited)[:5]}"
