# SPDX-License-Identifier: Apache-2.0
"""The balance loss of one modality at a time, which several strategies use; no strategy itself."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_smar.routing.strategies.base import RoutedTokens

BALANCE_LOSS = "modality balance loss"


def normalized_scores(logits: Tensor, score_function: str) -> Tensor:
    """Returns the scores of the experts, which add up to 1 for each token, [N, E], at least in float32.

    As in Megatron's aux_loss: the softmax over all experts, or other scores divided by their sum.

    Args:
        logits: Router logits, [N, E]; -inf for experts that a token may not choose.
        score_function: softmax, sigmoid or sqrtsoftplus.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function == "softmax":
        return logits.softmax(dim=-1)
    scores = logits.sigmoid() if score_function == "sigmoid" else F.softplus(logits).sqrt()
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)  # Megatron's epsilon


def balance_sums(tokens: RoutedTokens, top_k: int, score_function: str) -> dict[str, Tensor]:
    """Returns the sums over this rank's tokens that `balance_losses` needs, [M, E] each.

    `chosen` counts the top-k experts by score. As in Megatron's aux_loss, a bias on the choice and a capacity limit do
    not change it.

    Args:
        tokens: This rank's tokens.
        top_k: K, experts per token.
        score_function: softmax, sigmoid or sqrtsoftplus.
    """
    scores = normalized_scores(tokens.logits, score_function)
    with torch.no_grad():
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(top_k, dim=1).indices, 1.0)
    one_hot = tokens.modality_mask.to(scores.dtype).t()
    return {"scores": one_hot @ scores, "chosen": one_hot @ chosen}


def balance_losses(sums: Mapping[str, Tensor], tokens: Tensor, top_k: int, experts: Tensor | int) -> Tensor:
    """Returns each modality's balance loss, [M]: 1 for an even load, 0 for a modality without tokens.

    It is E * sum_e f_e P_e of the Switch Transformer (arXiv 2101.03961, Eq. 4 to 6), here over one modality's tokens:
    f_e is the share of their K choices that expert e gets, without a gradient, and P_e the mean of their scores.

    Args:
        sums: `balance_sums` over all tokens.
        tokens: Number of tokens of each modality, [M].
        top_k: K, experts per token.
        experts: E, the number of experts that a modality's tokens may choose, [M] or the same for all.
    """
    number = tokens.clamp(min=1).unsqueeze(1)
    return experts * (sums["chosen"] / (top_k * number) * sums["scores"] / number).sum(dim=1)


def weighted_sum(losses: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Returns the sum of losses [M], each times its coefficient, without a copy from the host."""
    return sum((c * loss for c, loss in zip(coefficients, losses.unbind(), strict=True)), losses.new_zeros(()))


def coefficients(flag: str, given: Sequence[str], modalities: Sequence[str]) -> list[float]:
    """Returns the coefficient of each modality, by id, from a flag such as text=0.01 vision=0.

    Args:
        flag: The flag's name, for messages.
        given: The flag's parts: NAME=NUMBER, 0 for a modality that is left out; or one number for all modalities.
        modalities: Names of the M modalities, by id.

    Raises:
        ValueError: A part has another form, a number is negative, or a name is unknown or repeated.
    """
    said = f"{flag} {' '.join(given)}"
    form = f"give one number of 0 or more, or numbers by modality, such as {modalities[0]}=0.01 {modalities[-1]}=0"
    parts = [part.rpartition("=")[::2] for part in given]
    try:
        numbers = {name: float(number) for name, number in parts}
    except ValueError as error:
        raise ValueError(f"{said} has a part without a number; {form}.") from error
    if not numbers or not all(0 <= number < float("inf") for number in numbers.values()):
        raise ValueError(f"{said} is not a coefficient of 0 or more; {form}.")
    if list(numbers) == [""] and len(parts) == 1:
        return [numbers[""]] * len(modalities)
    if len(numbers) < len(parts) or not set(numbers) <= set(modalities):
        raise ValueError(f"{said} must name each of {', '.join(modalities)} at most once; {form}.")
    return [numbers.get(name, 0.0) for name in modalities]


def check_balance(args: Namespace, strategy: str) -> None:
    """Refuses Megatron's own balance losses next to a strategy's.

    Args:
        args: The parsed flags.
        strategy: Name of the strategy.

    Raises:
        ValueError: One of them acts, and would balance the same tokens a second time.
    """
    kinds, coeffs = (
        value if isinstance(value, list) else [value]
        for value in (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff)
    )
    acting = [coeff for kind, coeff in zip(kinds, coeffs, strict=False) if kind.endswith("aux_loss") and coeff > 0]
    if acting:
        raise ValueError(
            f"--moe-aux-loss-coeff {acting[0]:g} would balance the same tokens as --modality-routing {strategy} does, "
            "regardless of their modality; leave it out."
        )
