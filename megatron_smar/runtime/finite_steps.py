# SPDX-License-Identifier: Apache-2.0
"""Stops a run, on all ranks and with one sentence, before a step with a NaN or infinite loss or gradient is applied.

With --max-skipped-steps the run continues without such a step, as often as that allows (`skipped_steps`).

The check uses the gradient norm, which Megatron reads in every step anyway. The losses of all ranks are included in it:
their sum times 0, which is 0 or NaN, is added to the gradients that the norm is computed from. So are the gradients
that the norm leaves out: those of a weight's copies on the other tensor-parallel ranks. With fp16, dynamic loss scaling
still skips steps whose gradients overflow, unless a weight is NaN or infinite, which no loss scale can fix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_smar.runtime.adaptation import Where, adaptation
from megatron_smar.runtime.skipped_steps import SKIPS


class NotFiniteError(RuntimeError):
    """A step's loss or gradient is NaN or infinite; raised on all ranks, before the step has changed anything."""


class _Step:
    """The faults found so far in the current step."""

    def __init__(self) -> None:
        # [2], one for the losses and one for the copies' gradients: 0, or NaN if any rank's is not finite.
        self.faults: Tensor | None = None
        self.own_losses: Tensor | None = None  # [], the same for this rank's losses
        self.optimizer: Any = None  # the outermost optimizer of this step; chained optimizers can be nested
        self.model: list[torch.nn.Module] = []
        self.verdict = ""  # of a second run of the step, which was still faulty or gave another result

    def begin(self, model: list[torch.nn.Module]) -> None:
        """Starts a step."""
        self.model, self.verdict = model, ""
        SKIPS.begin(model)

    def end(self) -> None:
        """Ends a step."""
        self.model, self.verdict, self.faults, self.own_losses = [], "", None, None

    def note(self, reports: Iterable[dict[str, Tensor]] | None, copies: list[Tensor]) -> None:
        """Checks losses and copies' gradients over all ranks, without copying anything from the device.

        Args:
            reports: Losses that this rank's micro-batches report.
            copies: Gradients of this rank's copies of weights, see `_copies`.
        """
        device = torch.cuda.current_device()
        losses = [value.detach().reshape(-1) for report in reports or () for value in report.values()]
        largest = [value.reshape(1) for value in torch._foreach_norm(copies, math.inf)] if copies else []
        zeros = [
            0 * torch.cat([value.to(device, torch.float32) for value in values]).sum()
            if values
            else torch.zeros((), device=device)
            for values in (losses, largest)
        ]
        self.own_losses, self.faults = zeros[0], torch.stack(zeros)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.faults)

    def with_faults(self, gradients: list[Tensor] | Tensor) -> list[Tensor]:
        """Returns the gradients to compute a norm from, with `faults` appended: zeros, or NaN that the norm shows."""
        gradients = [gradients] if isinstance(gradients, Tensor) else list(gradients)
        if self.faults is None:
            return gradients
        return [*gradients, self.faults.to(gradients[0].device, gradients[0].dtype) if gradients else self.faults]

    def has_faulty_loss(self) -> bool:
        """Returns whether a loss of any rank is not finite, the same on all ranks; this waits for the device."""
        return self.faults is not None and not bool(self.faults[0].isfinite())


_STEP = _Step()


@adaptation(
    "the first step after a start is applied even if it is not finite; so is every step without "
    "--check-for-nan-in-loss-and-grad, whose checks see only one rank's share and wait for the device",
    Where.ANYWHERE,
)
def refuse_steps_that_are_not_finite() -> None:
    """Makes the optimizer check the gradient norm, which includes the losses, before it changes a weight or moment."""
    import megatron.core.optimizer.layer_wise_optimizer as layer_wise
    import megatron.core.optimizer.optimizer as optimizers

    for module in (optimizers, layer_wise):
        module.get_grad_norm_fp32 = _norm_with_faults(module.get_grad_norm_fp32)
    step, get_grad_norm = optimizers.ChainedOptimizer.step, optimizers.ChainedOptimizer.get_grad_norm
    layer_wise_norm = layer_wise.LayerWiseDistributedOptimizer.get_grad_norm

    @functools.wraps(step)
    def checked_step(self: Any) -> tuple[bool, float | None, int | None]:
        if _STEP.optimizer is not None:
            return step(self)
        _STEP.optimizer = self
        try:
            if _STEP.verdict:
                raise NotFiniteError(_STEP.verdict)
            done = step(self)
            if not done[0] and done[1] is None and not _scale_adapts(self):  # a constant scale would skip every step
                raise NotFiniteError
            return done
        except NotFiniteError as error:
            if not _skips(str(error)):
                raise
            return False, None, None  # what Megatron's optimizers return for a step that overflows with fp16
        finally:
            _STEP.optimizer = None

    optimizers.ChainedOptimizer.step = checked_step
    optimizers.ChainedOptimizer.get_grad_norm = _checked_norm(get_grad_norm)
    layer_wise.LayerWiseDistributedOptimizer.get_grad_norm = _checked_norm(layer_wise_norm)


def _norm_with_faults(get_norm: Any) -> Any:
    @functools.wraps(get_norm)
    def get(grads_for_norm: list[Tensor] | Tensor, *args: Any, **kwargs: Any) -> Any:
        return get_norm(_STEP.with_faults(grads_for_norm), *args, **kwargs)

    return get


def _checked_norm(get_grad_norm: Any) -> Any:
    from megatron.core.optimizer.optimizer import SEPARATE_GRAD_NORM_GROUPS

    @functools.wraps(get_grad_norm)
    def get(self: Any) -> Any:
        norm = get_grad_norm(self)
        if _STEP.optimizer is not self:
            return norm
        norm = float(norm)  # a tensor with Transformer Engine; the training loop would read it only after the step
        apart = (group for group in SEPARATE_GRAD_NORM_GROUPS if self.has_grad_norm_group(group))  # not in the norm
        if not math.isfinite(norm + sum(float(self._get_grad_norm_for_group(group)) for group in apart)):
            raise NotFiniteError
        return norm

    return get


def _scale_adapts(optimizer: Any) -> bool:
    """Returns whether fp16's dynamic loss scaling is in use, where steps that are not finite are expected."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    inner = getattr(optimizer, "chained_optimizers", [])
    return isinstance(getattr(optimizer, "grad_scaler", None), DynamicGradScaler) or any(map(_scale_adapts, inner))


@adaptation(
    "a step that is not finite ends one rank with a traceback, or saves the damaged weights as the newest checkpoint "
    "(without --save: TypeError)",
    Where.ANYWHERE,
)
def stop_at_steps_that_are_not_finite() -> None:
    """Makes the training step raise `NotFiniteError` on all ranks, naming the fault, after pending saves finish."""
    import megatron.training.training as training

    train_step = training.train_step

    @functools.wraps(train_step)
    def watched_step(
        forward: Any, data: Any, model: Any, optimizer: Any, scheduler: Any, config: Any, schedule: Any, **kwargs: Any
    ) -> Any:
        def run_schedule(**arguments: Any) -> Any:
            reports = schedule(**arguments)
            _STEP.note(reports, _copies(model))
            return reports

        _STEP.begin(model)
        try:
            done = train_step(forward, data, model, optimizer, scheduler, config, run_schedule, **kwargs)
            if done[1] and _STEP.has_faulty_loss() and _any_rank(_faults(model)[0] != ""):
                raise NotFiniteError("no loss scale can help")
            return done
        except NotFiniteError as error:
            training.maybe_finalize_async_save(blocking=True, terminate=True)
            verdict = "; ".join(filter(None, (str(error), SKIPS.exhausted())))
            raise NotFiniteError(_sentence(_diagnose(model), _current_step(), verdict)) from None
        finally:
            _STEP.end()

    training.train_step = watched_step


@adaptation(
    "when a fault repeats, Megatron's rerun state machine saves the weights of the faulty step as the newest "
    "checkpoint, to try another GPU; and if it is disabled, it ends only one rank",
    Where.ANYWHERE,
)
def let_reruns_save_nothing() -> None:
    """Makes a step that is still faulty when rerun end without saving; without reruns only the norm is checked."""
    from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine

    validate, decide = RerunStateMachine.validate_result, RerunStateMachine.should_checkpoint_and_exit
    verdicts = {
        RerunState.RERUNNING_IN_PLACE: "a second run of the step gave another result, so suspect that rank's hardware",
        RerunState.WILL_RERUN_FROM_CHECKPOINT: "a second run of the step gave the same",
    }

    @functools.wraps(validate)
    def validate_for_reruns(self: Any, *args: Any, fatal: bool = True, **kwargs: Any) -> None:
        if self.mode != RerunMode.DISABLED or not fatal:
            validate(self, *args, fatal=fatal, **kwargs)

    @functools.wraps(decide)
    def decide_without_saving(self: Any) -> tuple[bool, bool, int]:
        if self.mode != RerunMode.VALIDATE_RESULTS or self.state not in verdicts:
            return decide(self)
        if SKIPS.left <= 0:
            raise NotFiniteError(verdicts[self.state])
        # The optimizer refuses the step; the next one begins as after any other, and no checkpoint holds the fault.
        _STEP.verdict, self.state = verdicts[self.state], RerunState.NOT_RUNNING_YET
        self.rerun_requested = self.checkpoint_requested = False
        self.failed_validation_call = self.initial_result = self.suspicious_node = self.suspicious_device = None
        return False, False, 0

    RerunStateMachine.validate_result = validate_for_reruns
    RerunStateMachine.should_checkpoint_and_exit = decide_without_saving


@dataclass(frozen=True)
class _Diagnosis:
    """What is wrong with a step, the same on all ranks.

    Attributes:
        what: What is NaN or infinite.
        weight: The first weight that is, with its rank; "" for none.
        gradient: The first gradient that is, with its rank; "" for none.
        keys: Keys of the samples by data-parallel rank, only of those whose loss is at fault if that is known.
    """

    what: str
    weight: str
    gradient: str
    keys: list[list[str]]


def _diagnose(model: list[torch.nn.Module]) -> _Diagnosis:
    """Finds what is wrong, on all ranks together; this waits for the device, when the step is lost anyway."""
    from megatron.core import parallel_state

    is_loss_faulty = _STEP.own_losses is not None and not bool(_STEP.own_losses.isfinite())
    own = (*_faults(model), is_loss_faulty, SKIPS.keys_of(_current_step()), parallel_state.get_data_parallel_rank())
    found = [own]
    if torch.distributed.is_initialized():
        found = [own] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own)
    weight, gradient = (
        next((f"{names[kind]} (rank {rank})" for rank, names in enumerate(found) if names[kind]), "") for kind in (0, 1)
    )
    faulty_losses = {replica for *_, is_faulty, _, replica in found if is_faulty}
    keys: dict[int, list[str]] = {}
    for *_, samples, replica in found:
        keys[replica] = samples if not faulty_losses or replica in faulty_losses else []
    what = "its loss" if _STEP.has_faulty_loss() else "its gradient, not its loss,"
    if _STEP.verdict and not gradient and not _STEP.has_faulty_loss():
        what = "its loss or gradient, the first time,"
    return _Diagnosis(what, weight, gradient, [keys[replica] for replica in sorted(keys)])


def _skips(verdict: str) -> bool:
    """Skips the present step, if that is allowed and can help; returns whether it did, the same on all ranks."""
    if SKIPS.left <= 0:
        return False
    found, step = _diagnose(_STEP.model), _current_step()
    if found.weight:  # every further step would have to be skipped
        return False
    SKIPS.skip(step)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        again = f"; {verdict}" if verdict else ""
        gradient = f"; the first gradient that is not finite is that of {found.gradient}" if found.gradient else ""
        print(
            f"WARNING: iteration {step} is skipped ({len(SKIPS.done)} of --max-skipped-steps {SKIPS.allowed}), since "
            f"{found.what} is NaN or infinite{again}{gradient}; its samples: {SKIPS.describe(step, found.keys)}",
            flush=True,
        )
    return True


def _current_step() -> int:
    from megatron.training import get_args

    return int(get_args().curr_iteration) + 1


def _sentence(found: _Diagnosis, step: int, verdict: str) -> str:
    """Returns what is wrong and how to fix it."""
    if found.weight:
        why = f"the weight {found.weight} was NaN or infinite before it: start from a checkpoint without such a weight"
    else:
        first = f", and the first gradient that is not is that of {found.gradient}" if found.gradient else ""
        why = f"every weight is finite{first}: look at the step's data, or lower --lr or --clip-grad, or warm up longer"
    again = f"; {verdict}" if verdict else ""
    return f"step {step} was not applied, since {found.what} is NaN or infinite{again}; {why}. {_newest_checkpoint()}"


def _copies(model: list[torch.nn.Module]) -> list[Tensor]:
    """Returns gradients of this rank's weights that the gradient norm counts on another tensor-parallel rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return []
    copies = (p for chunk in model for p in chunk.parameters() if not param_is_not_tensor_parallel_duplicate(p))
    gradients = (getattr(parameter, "main_grad", None) for parameter in copies)
    return [gradient for gradient in gradients if isinstance(gradient, Tensor)]


def _any_rank(is_so: bool) -> bool:
    if not torch.distributed.is_initialized():
        return is_so
    flag = torch.tensor([is_so], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _faults(model: list[torch.nn.Module]) -> tuple[str, str]:
    """Returns the names of this rank's first weight and first gradient that are not finite, "" for none."""
    named = [item for chunk in model for item in chunk.named_parameters()]
    weights = (name for name, weight in named if not weight.detach().isfinite().all())
    gradients = ((name, getattr(weight, "main_grad", None)) for name, weight in named)
    faulty = (name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all())
    return tuple(next(names, "").replace("module.", "") for names in (weights, faulty))  # type: ignore[return-value]


def _newest_checkpoint() -> str:
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_tracker_filename

    save = get_args().save
    tracker = Path(get_checkpoint_tracker_filename(save)) if save else None
    if tracker is None or not tracker.is_file():
        return "No checkpoint has been saved."
    return f"The newest checkpoint in {save} is that of step {tracker.read_text().strip()}."


ADAPTATIONS = (
    refuse_steps_that_are_not_finite,
    stop_at_steps_that_are_not_finite,
    let_reruns_save_nothing,
)
