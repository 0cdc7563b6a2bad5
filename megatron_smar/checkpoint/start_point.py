# SPDX-License-Identifier: Apache-2.0
"""Where a run starts: at the newest checkpoint in --save if there is one, else at --load, else with new weights.

So one command starts a run and, given again, resumes it. The flags that say how --load is loaded (--finetune and the
like) apply to the first start only, unless --load is --save and --finetune is not given. Each checkpoint stores its
run's origin (the checkpoint that the run started from) and the flags that identify the run; by these the checkpoints in
--save are recognized as this run's.
"""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.location import RELEASE, Location, locate, same_place
from megatron_smar.checkpoint.metadata import saved_arguments
from megatron_smar.model.parts import frozen_parts
from megatron_smar.routing.strategies import STRATEGIES

# Flags that say how a checkpoint is loaded, with the number of their values; left out when the run resumes from --save.
_LOADING_FLAGS = {
    "--load": 1,
    "--pretrained-checkpoint": 1,
    "--finetune": 0,
    "--ckpt-step": 1,
    "--no-load-optim": 0,
    "--no-load-rng": 0,
    "--no-load-dataloader-state": 0,
}
# Those of them that name the start itself; `apply_start` always replaces them by the start that was found.
_START_FLAGS = ("--load", "--pretrained-checkpoint", "--finetune")
# Arguments that identify a run, besides its origin: another value is another run. `checkpoint.continuation` checks the
# schedules of learning rate and weight decay.
_RUN_IDENTITY = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_experts",
    "moe_router_topk",
    "connector",
    "freeze",
    "modality_routing",
    "data_path",
    "conversation_template",
    "seq_length",
    "seed",
)


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    Attributes:
        load: Folder of the checkpoints to load from; None for new weights.
        finetune: Whether a new run starts from the weights there (--finetune).
        origin: The run's origin, as its checkpoints store it: {"folder", "checkpoint", "fingerprint", "finetune"}.
            Empty if the flags name no start, and where a run resumes with its --save as --load: `keep_origin` then
            takes the stored origin.
        resumes_from_save: Whether the run resumes from --save although the flags name another start or none.
        notes: Lines to print.
        step: Step to load, where it is not the one that the tracker or --ckpt-step names.
    """

    load: str | None
    finetune: bool
    origin: dict[str, Any]
    resumes_from_save: bool = False
    notes: tuple[str, ...] = ()
    step: int | None = None


def find_start(args: Namespace) -> StartPoint:
    """Decides where a run starts, before anything is built.

    Args:
        args: The arguments as Megatron's parser returns them, before Megatron validates them.

    Raises:
        ValueError: A folder has no checkpoint where one is required, or does not hold what the flags say.
    """
    _check_flags(args)
    load, finetune = _given_start(args)
    if load is None and args.exit_on_missing_checkpoint:
        raise ValueError("--load is missing, without which there are only random weights; give a checkpoint's folder.")
    if args.save is None or args.skip_train:
        source = _source(args, load, finetune) if load is not None else None
        return StartPoint(load, finetune, _origin(source, finetune), notes=_notes("--load", source))
    # --ckpt-step chooses among the checkpoints of --load.
    step = args.ckpt_step if same_place(args.load, args.save) else None
    saved = locate("--save", args.save, step, fall_back=True)
    _check_writable(Path(args.save))
    if saved.checkpoint is not None and not saved.is_release:
        return _resumed(args, saved, load, finetune)
    if same_place(load, args.save):
        if saved.checkpoint is None and (finetune or args.exit_on_missing_checkpoint):
            flag = "--finetune" if finetune else "--exit-on-missing-checkpoint"
            raise ValueError(f"{flag} needs a checkpoint in --load, but {load} holds none; give another folder.")
        found = load if saved.checkpoint is not None else None
        notes = _notes("--save", saved) + (() if found else (_new_weights(args.save),))
        return StartPoint(found, finetune, _origin(saved, finetune), notes=notes)
    if saved.checkpoint is not None:
        raise ValueError(
            f"--save {args.save} holds a converted model, which belongs to no run; give another folder to save in"
            + ("." if load else ", or --load with this one to train from it.")
        )
    if load is None:
        return StartPoint(None, False, {}, notes=(*_notes("--save", saved), _new_weights(args.save)))
    source = _source(args, load, finetune)
    return StartPoint(
        load, finetune, _origin(source, finetune), notes=_notes("--load", source) + _notes("--save", saved)
    )


def apply_start(argv: Sequence[str], start: StartPoint) -> list[str]:
    """Returns the command line that makes Megatron start at a start point.

    Args:
        argv: The flags as given.
        start: The result of `find_start`.
    """
    kept, skipped = [], 0
    for part in argv:
        name, joined = part.partition("=")[::2] if part.startswith("--") else (part, "")
        if skipped:
            skipped -= 1
        elif name not in (_LOADING_FLAGS if start.resumes_from_save else _START_FLAGS):
            kept.append(part)
        else:
            skipped = 0 if joined else _LOADING_FLAGS[name]
    if start.step is not None:
        kept += ["--ckpt-step", str(start.step)]
    kept += ["--load", start.load] if start.load is not None else []
    return [*kept, *(["--finetune"] if start.finetune else [])]


def keep_origin(args: Namespace, start: StartPoint, state: dict[str, Any] | None) -> None:
    """Sets `args.origin`, which is saved with every checkpoint, and checks that --save holds this run's checkpoints.

    Args:
        args: The run's validated arguments.
        start: The result of `find_start`.
        state: The result of `fit.resumed_state`; None if the run does not resume.

    Raises:
        CheckpointMismatchError: The checkpoints in --save are another run's.
    """
    args.origin = start.origin
    if state is None:
        return
    saved = saved_arguments(state)
    if start.resumes_from_save:
        _check_same_run(args, saved, start)
    if same_place(args.load, args.save):
        args.origin = getattr(saved, "origin", None)


def _check_flags(args: Namespace) -> None:
    for flag, path in (
        ("--load", args.load),
        ("--save", args.save),
        ("--pretrained-checkpoint", args.pretrained_checkpoint),
    ):
        if path is not None and not path.strip():
            raise ValueError(f"{flag} is empty; give a folder, or leave the flag out.")
    if args.finetune and args.load is None and args.pretrained_checkpoint is None:
        raise ValueError("--finetune starts from the weights in --load, which is missing; give it.")
    if args.ckpt_step is not None and args.load is None:
        raise ValueError(f"--ckpt-step {args.ckpt_step} is that of a checkpoint in --load, which is missing; give it.")
    if args.ckpt_step is not None and args.ckpt_step <= 0:
        raise ValueError(f"--ckpt-step is {args.ckpt_step}; steps count from 1: give that of a checkpoint in --load.")


def _given_start(args: Namespace) -> tuple[str | None, bool]:
    """Returns the folder to load from and --finetune, as the flags give them.

    --pretrained-checkpoint acts as --load with --finetune, unless --load holds a checkpoint.
    """
    if args.pretrained_checkpoint is not None:
        has_own = args.load is not None and locate("--load", args.load).checkpoint is not None
        if not has_own:
            return args.pretrained_checkpoint, True
    return args.load, args.finetune


def _source(args: Namespace, load: str, finetune: bool) -> Location:
    """Returns the location of the checkpoint in --load.

    Raises:
        ValueError: There is none.
    """
    found = locate("--load", load, args.ckpt_step)
    if found.checkpoint is None:
        half = f" but {', '.join(found.half_written)}, which {_are(found)} half-written" if found.half_written else ""
        place = "holds no checkpoint" + half if Path(load).is_dir() else "does not exist"
        raise ValueError(
            f"--load {load} {place}, and {'--finetune starts from its weights' if finetune else 'the run would start'}"
            f"{'' if finetune else ' with random weights'}; give the folder that --save or a conversion named, or "
            "leave --load out for new weights."
        )
    return found


def _resumed(args: Namespace, saved: Location, load: str | None, finetune: bool) -> StartPoint:
    """Returns the start point of a run that has checkpoints in --save."""
    notes = [*_notes("--save", saved)]
    notes += [f"WARNING: {sentence}. The run resumes from step {saved.step} instead." for sentence in saved.rejected]
    taken = saved.step if saved.rejected else None
    if same_place(load, args.save) and not finetune:
        if args.ckpt_step is not None and saved.newer:
            notes.append(
                f"--ckpt-step {args.ckpt_step}: the run goes back to this step, and what --save {args.save} holds of "
                f"later ones ({', '.join(saved.newer)}) will be replaced."
            )
        return StartPoint(args.save, False, {}, notes=tuple(notes), step=taken)
    origin = _origin_if_there(args, load, finetune)
    notes.append(
        f"--save {args.save} holds this run up to step {saved.step}: it resumes there"
        + (f", and does not start again from --load {load}." if load else ".")
    )
    return StartPoint(args.save, False, origin, resumes_from_save=True, notes=tuple(notes), step=taken)


def _origin_if_there(args: Namespace, load: str | None, finetune: bool) -> dict[str, Any]:
    """Returns the origin that a run started now would store; the --load of a resumed run may be gone or damaged."""
    if load is None:
        return {}
    if same_place(load, args.save):  # one folder holds a converted model and the run that started from it
        release = Path(load) / RELEASE
        source = Location(Path(load), release if (release / ".metadata").is_file() else None)
        return _origin(source, finetune)
    try:
        source = locate("--load", load, args.ckpt_step)
    except ValueError:
        source = Location(Path(load), None)
    return _origin(source, finetune)


def _origin(source: Location | None, finetune: bool) -> dict[str, Any]:
    if source is None:
        return {}
    contents = source.checkpoint / ".metadata" if source.checkpoint else None
    return {
        "folder": str(source.path.resolve()),
        "checkpoint": source.checkpoint.name if source.checkpoint else None,
        # torch stores a new identifier in .metadata at each save, so no two saves have the same hash.
        "fingerprint": hashlib.sha256(contents.read_bytes()).hexdigest() if contents else None,
        "finetune": finetune or source.is_release,
    }


def _check_same_run(args: Namespace, saved: Any, start: StartPoint) -> None:
    found = [_other_start(start.origin, getattr(saved, "origin", None))]
    strategy = STRATEGIES[args.modality_routing]
    for name in (*_RUN_IDENTITY, *(f"{strategy.name}_{field}" for field in strategy.of_a_run)):
        was, now = _comparable(name, getattr(saved, name, None)), _comparable(name, getattr(args, name, None))
        if was != now:
            flag = f"--{name.replace('_', '-')}"
            found.append(f"{flag} was {_shown(getattr(saved, name, None))}, not {_shown(getattr(args, name, None))}")
    differences = list(filter(None, found))
    if differences:
        raise CheckpointMismatchError(
            f"--save {args.save} holds another run: {'; '.join(differences)}. Give another --save for a new run, or "
            f"--load {args.save} without --finetune to resume that one with these flags."
        )


def _other_start(given: dict[str, Any], stored: dict[str, Any] | None) -> str:
    """Describes how the origin of the run in --save differs from the flags' origin; empty if it does not."""
    if stored is None:
        return "it does not say where it started"
    if not given or not stored:
        return "" if given == stored else f"it started {_named(stored)}, and this one starts {_named(given)}"
    is_there = given["fingerprint"] is not None
    same = given["fingerprint"] == stored["fingerprint"] if is_there else given["folder"] == stored["folder"]
    if not same:
        again = ", which was saved again since" if given["folder"] == stored["folder"] else ""
        return f"it started {_named(stored)}, and this one starts {_named(given)}{again}"
    if is_there and given["finetune"] != stored["finetune"]:
        return f"it started with{'' if stored['finetune'] else 'out'} --finetune"
    return ""


def _named(origin: dict[str, Any]) -> str:
    if not origin:
        return "with new weights"
    return f"from {origin['folder']}" + (f"/{origin['checkpoint']}" if origin["checkpoint"] else "")


def _comparable(name: str, value: Any) -> Any:
    """Returns a flag's value in a normal form, so that equal settings compare equal."""
    if name == "freeze":
        return frozen_parts(value or ())
    if name == "data_path" and value:
        return [part if "://" in part else str(Path(part).resolve()) for part in value]
    return value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _notes(flag: str, place: Location | None) -> tuple[str, ...]:
    """Returns a line about half-written checkpoints, which are not loaded; empty if there are none."""
    if place is None or not place.half_written:
        return ()
    names = ", ".join(place.half_written)
    return (f"{flag} {place.path}: {names} {_are(place)} half-written and ignored.",)


def _new_weights(save: str) -> str:
    return f"--save {save} holds no checkpoint: the run starts at step 0, with new weights."


def _are(place: Location) -> str:
    return "are" if len(place.half_written) > 1 else "is"


def _check_writable(folder: Path) -> None:
    """Refuses a --save that cannot be written to, before the run trains what it could not save."""
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--save {folder}: nothing can be written in {there}; give another folder.")
