# SPDX-License-Identifier: Apache-2.0
"""Tests of the functions that are compiled on a GPU."""

import pytest
import torch
from megatron.core import jit

from megatron_smar.routing import closed_form
from megatron_smar.routing.fusion import FusedFunction, constant
from megatron_smar.routing.strategies import smar


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


def calls(modalities=3, experts=6):
    """Returns every fused function of SMAR with arguments, in float64."""
    generator = torch.Generator().manual_seed(modalities)
    counts, weights = (torch.rand(modalities, experts, generator=generator).double() + 0.1 for _ in range(2))
    tokens = torch.tensor([4.0, 0.0, 2.0]).double()[:modalities]
    probs, gradient = (torch.rand(9, experts, generator=generator).double() for _ in range(2))
    constants = closed_form._pairs(modalities, 1.0, torch.float64, counts.device)
    _, _, *saved = closed_form._distance(counts, weights, tokens, *constants, 1e-3)
    one, distance = torch.ones((), dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    return {
        closed_form._divided_by_sum: (probs,),
        closed_form._gradient_of_division: (gradient, probs, probs.sum(1, keepdim=True)),
        closed_form._distance: (counts, weights, tokens, *constants, 1e-3),
        closed_form._gradient_of_distance: (one, counts, *saved),
        smar._outside: (distance, one, constant((1.5, 2.0), torch.float64, one.device)),
        smar._gradient_outside: (distance, -distance),
    }


def test_a_fused_function_cannot_be_compiled_whole_or_computes_something_else():
    for function, arguments in calls().items():
        compiled = torch.compile(function.function, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-12, atol=1e-12)


def test_another_band_makes_torch_compile_the_loss_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(smar._outside.function, backend=counter)
    for band in ((1.0, 1.5), (1.5, 2.0), (0.5, 3.0)):
        compiled(torch.tensor(2.5), torch.tensor(1.0), constant(band, torch.float32, torch.device("cpu")))
    assert counter.frame_count == 1


@pytest.mark.parametrize("fuses", [True, False])
def test_megatrons_switch_does_not_decide_what_is_compiled_on_a_gpu(monkeypatch, fuses):
    """With --disable-jit-fuser Megatron sets its decorator after the package has been imported."""
    compiled = []
    monkeypatch.setattr(jit, "jit_fuser", lambda function: compiled.append(function) or function)
    if not fuses:
        jit.disable_jit_fuser()
    double = FusedFunction(lambda value: value * 2)
    assert double(torch.ones(())) == 2 and not compiled, "nothing is compiled on the CPU"
    for _ in range(2):
        assert double(torch.ones(()).as_subclass(OnGpu)) == 2
    assert len(compiled) == fuses
