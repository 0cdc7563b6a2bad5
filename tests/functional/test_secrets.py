# SPDX-License-Identifier: Apache-2.0
"""Passwords and tokens of a run are in none of the files and messages that it leaves."""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.launch import TWO_STEPS, run

PASSWORD = "hunter2-Password"
SECRETS = {
    name: f"hunter2-{name}" for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
}


class Guarded(SimpleHTTPRequestHandler):
    """A file server that asks for a user and a password."""

    protocol_version = "HTTP/1.1"

    def send_head(self):
        right = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == right:
            return super().send_head()
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, *args) -> None:
        """Writes no log."""


@pytest.fixture
def address(world):
    """The address of the world's shards on such a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(world.root / "shards"))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}/train"
        finally:
            server.shutdown()
            thread.join()


def files_with(folder: Path, secret: str) -> list[Path]:
    """Returns the files below a folder with a text; torch's and Megatron's formats are not compressed."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.matrix
def test_a_runs_password_or_tokens_are_in_its_log_or_files(world, address, tmp_path):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    (tmp_path / "netrc").chmod(0o600)
    variables = SECRETS | {"NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "offline", "TMPDIR": str(scratch)}
    flags = ["--data-path", f"http://{address}", "--save", out, "--save-interval", 2, "--tensorboard-dir", out / "tb"]
    flags += ["--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", out / "wandb", "--all-messages"]
    said = world.train(*TWO_STEPS, *flags, "--rejects-dir", out / "rejects", ranks=1, rank=variables).stdout
    said += run("tools/report.py", out, "--tensorboard-dir", out / "tb", rank=variables).stdout
    assert "iteration        2/" in said and (out / "report.html").is_file() and (out / "iter_0000002").is_dir()
    assert files_with(out, f"http://{address}"), "the search finds nothing"
    assert list((out / "wandb").rglob("*.wandb")), "W&B wrote nothing"
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    for secret in (PASSWORD, basic, *SECRETS.values()):
        assert secret not in said
        assert not files_with(out, secret) + files_with(scratch, secret), secret


@pytest.mark.parametrize("where", ["query", "run file"])
def test_an_address_with_a_password_is_used_or_repeated_by_a_rank(world, address, tmp_path, where):
    given = f"http://{address}?X-Amz-Signature={PASSWORD}" if where == "query" else f"http://me:{PASSWORD}@{address}"
    flags = ["--data-path", given]
    if where == "run file":
        (tmp_path / "run.yaml").write_text(f"data-path: {given}\n")
        flags = ["--config", tmp_path / "run.yaml"]
    out = tmp_path / "out"
    errors = world.errors(*TWO_STEPS, *flags, "--save", out, "--tensorboard-dir", out)
    assert errors[0] == errors[1] and "--data-path has a" in errors[0] and PASSWORD not in errors[0]
    assert not out.exists()
