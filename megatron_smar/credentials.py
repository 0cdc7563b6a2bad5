# SPDX-License-Identifier: Apache-2.0
"""Refuses passwords, tokens and signatures in flags and addresses, and takes them out of messages.

Flags are printed, written to run.yaml and stored in every checkpoint, and `ps` shows them to all users of a node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names of flags and variables whose values are secrets.
SECRET_NAME = re.compile(r".*(^|[-_])(token|secret|password|credentials?|(api|access|secret)[-_]?key)", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SIGNED = re.compile(r"://[^\s?'\"]*\?[^\s'\"]*=")
_QUERY = re.compile(r"((?:://|url: /)[^\s?'\"]*)\?[^\s'\")]+")  # requests' messages have `url: /PATH?QUERY`


def check_flags(words: Iterable[str]) -> None:
    """Refuses flags with an address that contains a secret.

    Args:
        words: Flags and their values.

    Raises:
        ValueError: As for `check_address`.
    """
    flag = "the command line"
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        check_address(word, flag)


def check_address(text: str, where: str) -> None:
    """Refuses an address that contains a password or a signature.

    Args:
        text: The address.
        where: What the address belongs to, for the message.

    Raises:
        ValueError: It contains one. The message does not.
    """
    if _USER.search(text):
        raise ValueError(
            f"{where} has a user or password in its address ({redacted(text)}), which `ps`, logs and checkpoints would "
            "show: leave it out, and write `machine HOST login USER password PASSWORD` into ~/.netrc."
        )
    if _SIGNED.search(text):
        raise ValueError(
            f"{where} has a signature or other query in its address ({redacted(text)}), which `ps`, logs and "
            "checkpoints would show: leave it out; S3 is s3://BUCKET/PATH with AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        )


def redacted(text: str) -> str:
    """Returns a text without the users, passwords and queries of the addresses in it."""
    return _QUERY.sub(r"\1?...", _USER.sub("...@", text))
