# SPDX-License-Identifier: Apache-2.0
"""Megatron's initialization, for every program that trains or evaluates: flags, checks, process groups, model."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_smar import __version__, credentials, runtime
from megatron_smar.checkpoint.continuation import check_continuation
from megatron_smar.checkpoint.expert_order import keep_expert_order
from megatron_smar.checkpoint.fit import CheckpointMismatchError, leave_other_random_state, resumed_state
from megatron_smar.checkpoint.loadable import check_loadable
from megatron_smar.checkpoint.location import locate
from megatron_smar.checkpoint.metadata import DamagedError, run_arguments
from megatron_smar.checkpoint.model_identity import check_identity
from megatron_smar.checkpoint.start_point import StartPoint, apply_start, find_start, keep_origin
from megatron_smar.checkpoint.valid import take_valid_checkpoint
from megatron_smar.config.build import RunConfig, set_run_config, transformer_config
from megatron_smar.config.checks import check_arguments, check_shape
from megatron_smar.config.flag_errors import FLAG_ERRORS, sentence
from megatron_smar.config.flags import add_arguments
from megatron_smar.config.run_file import add_run_file_options, expand, write_run_file
from megatron_smar.monitoring.tracker import install_metrics
from megatron_smar.reliability.saving import CheckpointSaver
from megatron_smar.reliability.space import check_room
from megatron_smar.routing.strategies import STRATEGIES
from megatron_smar.runtime import failure
from megatron_smar.runtime.saving import HOOKS
from megatron_smar.training.console import show_step_lines
from megatron_smar.training.providers import model_provider
from megatron_smar.training.resume import save_state, take_over_folder
from megatron_smar.training.watch import count_skipped_steps


def parse_arguments(
    argv: Sequence[str] | None = None, needs_data: bool = True, defaults: Mapping[str, Any] | None = None
) -> Namespace:
    """Parses and checks Megatron's and this project's flags, and builds the tokenizer and Megatron's other globals.

    Args:
        argv: The flags; None for the command line's. They replace sys.argv, since Megatron's parser reads only that.
        needs_data: Whether the program reads --data-path.
        defaults: Values of arguments whose flags are not given, by argument (`stored_flags`).

    Returns:
        The validated arguments.

    Raises:
        SystemExit: With one sentence, for flags that cannot train.
    """
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]
    try:
        sys.argv[1:] = given_flags = expand(sys.argv[1:])
        credentials.check_flags(given_flags)
    except ValueError as error:
        fail(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"megatron_smar {__version__}: {runtime.describe()}", flush=True)
    given = None

    def add_flags(parser: ArgumentParser) -> ArgumentParser:
        parser = add_arguments(parser)
        add_run_file_options(parser.add_argument_group("a run as a file", "docs/run_files.md"))
        parser.set_defaults(**defaults or {})
        return parser

    try:
        given = parse_args(add_flags)
        point = find_start(given)
        sys.argv[1:] = [*apply_start(sys.argv[1:], point), *_strategy_defaults(given, point)]
        given = parse_args(add_flags)
        check_arguments(given, needs_data)
        check_loadable(given)
        args = given = parse_and_validate_args(add_flags)
        if args.use_checkpoint_args:
            check_shape(args)
        transformer_config(args)  # runs its checks now, before any rank waits for another
        check_identity(args, get_tokenizer())
        # Stored in checkpoints, with all other arguments.
        args.program = {"megatron_smar": __version__, **{name: version(name) for name in ("megatron-core", "torch")}}
        args.program["device"] = runtime.device()
        _set_biases_apart(args)
        _resume(args, point)
        run = RunConfig.from_arguments(args, needs_data)
    except FLAG_ERRORS as error:
        fail(error, given)
    if needs_data and args.save and args.rank == 0:
        write_run_file(Path(args.save), given_flags)
    set_run_config(run)
    install_metrics(run.monitor)
    show_step_lines()
    take_over_folder(args)
    _trust_checkpoints(args, run)
    return args


def _trust_checkpoints(args: Namespace, run: RunConfig) -> None:
    """Makes Megatron's saves leave a complete checkpoint or none, and its loads take an undamaged one."""
    HOOKS.load = partial(take_valid_checkpoint, args, run.reliability.verify_checkpoint)
    if args.save and not args.skip_train:
        saver = CheckpointSaver(run.reliability, Path(args.save), Path(args.loader_state_folder), save_state)
        saver.install()

        def begin(model: list[Any], optimizer: Any) -> None:
            if args.rank == 0:
                saver.clear()
            check_room(model, Path(args.save))

        HOOKS.train = begin


def _strategy_defaults(args: Namespace, start: StartPoint) -> list[str]:
    """Returns flags of the chosen strategy whose default depends on other flags or on the run that is resumed."""
    saved = None
    if start.load is not None and not start.finetune:
        step = start.step or (None if start.resumes_from_save else args.ckpt_step)
        found = locate("--load", start.load, step)
        if found.checkpoint is not None and not found.is_release:
            saved = run_arguments(found.path, step)
    defaults = STRATEGIES[args.modality_routing].default_flags(args, saved)
    return [part for flag, value in defaults.items() for part in (flag, str(value))]


def _resume(args: Namespace, point: StartPoint) -> None:
    """Checks the checkpoint that a run resumes from against its flags, and prints where the run starts.

    Raises:
        CheckpointMismatchError: The run cannot be resumed with these flags.
    """
    state = resumed_state(args)
    keep_origin(args, point, state)
    keep_expert_order(args)
    check_continuation(args, state)
    leave_other_random_state(args, state)
    count_skipped_steps(args, state)
    for note in point.notes:
        print_rank_0(note)


def _set_biases_apart(args: Namespace) -> None:
    """Puts the modality biases, float32 in a half-precision model, into a separate parameter group of the optimizer.

    Within a group Megatron 0.19.2's distributed optimizer puts float32 parameters before the others, but looks up their
    state in the model's order when it saves (`model_param_group_index_map`): a group with both cannot be saved. The
    parameters that `--decoupled-lr` applies to have a separate group, whatever its value, and the biases are marked as
    such parameters (`ModalityBias`).
    """
    if (args.bf16 or args.fp16) and args.decoupled_lr is None:
        args.decoupled_lr, args.decoupled_min_lr = args.lr, args.min_lr


def fail(error: BaseException, args: Namespace | None = None) -> NoReturn:
    """Ends this rank with one sentence.

    Args:
        error: The error that stopped it.
        args: The parsed flags, for errors from Megatron that do not name them.
    """
    if isinstance(error, CheckpointException):  # torch's wrapper of the errors of all ranks
        error = next(inner for inner, _ in error.failures.values())
    failure.end(sentence(error, args))


def fail_before_training(error: BaseException) -> None:
    """Ends this rank with one sentence if no step has begun; after that, the flags are not the cause of the error."""
    if getattr(get_args(), "curr_iteration", None) is None:
        fail(error, get_args())


def start(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> tuple[list[Any], Any, Any]:
    """Initializes Megatron and builds (or loads) the model as `pretrain()` would, without training.

    Args:
        argv: The flags, as for `parse_arguments`.
        defaults: Values of arguments whose flags are not given, as for `parse_arguments`.

    Returns:
        (model chunks, optimizer, learning-rate scheduler); the last two are None with --skip-train.
    """
    parse_arguments(argv, False, defaults)
    initialize_megatron()
    try:
        return setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            model_provider_func=model_provider,
            checkpointing_context={},
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    except (CheckpointMismatchError, DamagedError, CheckpointException) as error:
        fail(error)
    except FLAG_ERRORS as error:
        fail(error, get_args())
