# SPDX-License-Identifier: Apache-2.0
"""Trains a vision-language mixture-of-experts model, with Megatron's and this project's flags (`--help`).

On GPUs:       torchrun --nproc-per-node 8 pretrain_vlm.py --vision-model PATH --data-path PATH ...
Without GPUs:  the same command; Megatron then runs on the CPU with Gloo.
The first line of a run shows the device and what it changes; MEGATRON_SMAR_DEVICE=cpu or cuda selects it.
"""

from __future__ import annotations

from megatron_smar import runtime

runtime.install_or_exit()

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.metadata import DamagedError
from megatron_smar.config.flag_errors import FLAG_ERRORS
from megatron_smar.data.rejects import DataError
from megatron_smar.evaluation.during_training import training_benchmarks
from megatron_smar.reliability.saving import SaveFailedError
from megatron_smar.runtime.finite_steps import NotFiniteError
from megatron_smar.training.providers import build_forward_step, data_iterators_provider, model_provider
from megatron_smar.training.setup import fail, fail_before_training, parse_arguments
from megatron_smar.training.stop import end_after_a_signal
from megatron_smar.training.watch import watch_for_hangs


def main() -> None:
    """Parses the flags, refuses those that cannot train, and calls Megatron's `pretrain()`."""
    args = parse_arguments()
    try:
        forward_step = build_forward_step()
        benchmarks = training_benchmarks(args)
    except ValueError as error:  # a tokenizer without the image tokens, or a benchmark whose files cannot be used
        fail(error)
    watch_for_hangs(args)
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            data_iterators_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            model_provider=model_provider,
            non_loss_data_func=benchmarks,
        )
    except (
        CheckpointMismatchError,
        DamagedError,
        CheckpointException,
        DataError,
        NotFiniteError,
        SaveFailedError,
    ) as error:
        fail(error)
    except SystemExit as end:  # raised by Megatron's loop, also after a signal
        end_after_a_signal(args)
        raise end
    except FLAG_ERRORS as error:
        fail_before_training(error)
        raise


if __name__ == "__main__":
    main()
