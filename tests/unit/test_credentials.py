# SPDX-License-Identifier: Apache-2.0
"""Passwords and signatures in addresses."""

import pytest

from megatron_smar.credentials import check_flags, redacted

WITH_SECRETS = [
    "https://me:hunter2@host/shards",
    "http://hunter2@host:8000/shards",
    "s3://AKIA:hunter2@bucket/shards",
    "https://bucket.s3.amazonaws.com/a?X-Amz-Signature=hunter2",
    "https://account.blob.core.windows.net/a?sv=1&sig=hunter2",
]


@pytest.mark.parametrize("address", WITH_SECRETS)
@pytest.mark.parametrize("joined", [True, False])
def test_an_address_with_a_secret_is_accepted_or_repeated(address, joined):
    words = [f"--data-path={address}"] if joined else ["--data-path", address]
    with pytest.raises(ValueError, match=r"^--data-path has a (user or password|signature or other query)") as error:
        check_flags(["--lr", "1", *words, "--seed", "1"])
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in redacted(f"({address}): it failed")


WITHOUT = ["https://host/a@b", "s3://bucket/path", "/a?b=c", "me@host", "msc://profile/a", "http://[::1]:80/a", "a://b"]


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_a_secret_is_refused_or_changed(address):
    check_flags(["--data-path", address])
    assert redacted(address) == address


def test_a_message_of_requests_keeps_the_signature():
    said = "HTTPConnectionPool(host='h', port=1): Max retries exceeded with url: /a?X-Amz-Signature=hunter2 (Cause"
    assert redacted(said) == said.replace("X-Amz-Signature=hunter2", "...")
