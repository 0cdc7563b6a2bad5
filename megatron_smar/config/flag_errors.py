# SPDX-License-Identifier: Apache-2.0
"""The message that a user gets for wrong flags: one sentence with the flags, their values and the fix."""

from __future__ import annotations

import re
import traceback
from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from megatron.training.arguments import add_megatron_arguments

from megatron_smar.runtime import failure

# The errors that wrong flags cause at startup: Megatron asserts, raises, or imports what is not installed.
FLAG_ERRORS = (AssertionError, ValueError, ImportError, NotImplementedError)


def explain_unknown_flags(parser: ArgumentParser) -> None:
    """Makes a parser exit with one sentence instead of its usage, naming the flags closest to a mistyped flag."""

    def error(message: str) -> NoReturn:
        failure.end(_unknown(parser, message) or f"{message}; --help lists all flags.", status=2)

    parser.error = error  # type: ignore[method-assign]


def _unknown(parser: ArgumentParser, message: str) -> str | None:
    """Returns the sentence for argparse's "unrecognized arguments", or None for another message."""
    head, _, given = message.partition("unrecognized arguments: ")
    if head or not given:
        return None
    flags = [word.partition("=")[0] for word in given.split() if word.startswith("--")]
    if not flags:
        return f"{given} belongs to no flag; --help lists them."
    known = [flag for action in parser._actions for flag in action.option_strings]
    unknown = []
    for flag in flags:
        near = get_close_matches(flag, known, n=3, cutoff=0.7)
        unknown.append(f"{flag} is not a flag" + (f" (close to it: {', '.join(near)})" if near else ""))
    return f"{', '.join(unknown)}; --help lists all flags."


def sentence(error: BaseException, args: Namespace | None = None) -> str:
    """Returns an error as one sentence: its message, or the check that failed, and the flags it concerns.

    Args:
        error: The error. This project's errors have a complete sentence; Megatron's name arguments as in its code, or
            have no message.
        args: The parsed flags; None if they have not been parsed.
    """
    message = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    checked = (frames[-1].line or "") if frames else ""
    if frames and not message:  # many of Megatron's assertions have no message
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        message = f"the flags do not pass Megatron's check `{checked}` ({place})"
    if "trust_remote_code=True" in message:  # transformers' own message has three lines and names no flag
        head = str(error).splitlines()[0].rstrip(".")
        return f"{head}; a folder's code is only run with --trust-remote-code: give a --tokenizer-model without it."
    if args is None or "--" in message:
        return message
    flags = _flags_of(f"{message} {checked}", args)
    return f"{message.rstrip('.')}; the flags are: {', '.join(flags)}." if flags else message


def _flags_of(text: str, args: Namespace, most: int = 6) -> list[str]:
    """Returns the flags, each with its value, whose argument names (as in Megatron's code) occur in a text."""
    words = set(re.findall(r"[a-z][a-z0-9_]*_[a-z0-9_]+", text.replace(" ", "  ")))
    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False, conflict_handler="resolve"))
    shown: dict[str, str] = {}
    for action in parser._actions:
        if action.dest in words and action.option_strings and hasattr(args, action.dest):
            value = getattr(args, action.dest)
            flag = action.option_strings[0] if action.nargs != 0 or value == action.const else None
            if flag:
                shown.setdefault(action.dest, flag if action.nargs == 0 else f"{flag} {value}")
    return list(shown.values())[:most]
