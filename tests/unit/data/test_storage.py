# SPDX-License-Identifier: Apache-2.0
"""Shards on a local HTTP server and on a local S3 server give the same samples as the folder."""

import contextlib
import io
import json
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import boto3
import pytest
import yaml
from megatron.energon.epathlib import EPath
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

from megatron_smar import runtime
from megatron_smar.data import DataConfig, EnergonIterator, ImageConfig, build_train_loader, build_valid_loader
from megatron_smar.data.paths import check_data_path, energon_path

from ...conftest import free_port

Samples = list[tuple[list[str], list[Any], list[Any]]]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*use of fork.*")


class Handler(SimpleHTTPRequestHandler):
    """Python's own file server, keeping connections open as real servers do."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Writes no log."""


@contextmanager
def serving(handler: Callable[..., Any]) -> Iterator[str]:
    """Runs an HTTP server in a thread; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:  # otherwise a failing test leaves a thread that keeps the process from ending
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def http_url(shards: Path) -> Iterator[str]:
    """An HTTP server whose root is the parent folder of the shards."""
    with serving(partial(Handler, directory=str(shards.parent))) as url:
        yield url


@pytest.fixture(scope="module")
def s3_endpoint(shards: Path) -> Iterator[str]:
    """An S3 server with the shards at s3://data/team/shards, and the environment variables for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WSGIRequestHandler, "protocol_version", "HTTP/1.1")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for file in shards.rglob("*"):
            if file.is_file():
                client.upload_file(str(file), "data", f"team/shards/{file.relative_to(shards)}")
        # As copied by a program that skips files whose names begin with a dot.
        client.upload_file(str(shards / ".nv-meta/dataset.yaml"), "data", "visible/.nv-meta/dataset.yaml")
        yield endpoint
        server.stop()


def configuration(path: str, num_workers: int) -> DataConfig:
    """Returns a configuration for both splits of the data at `path`."""
    return DataConfig(
        data_path=path,
        valid_data_path=path,
        seq_length=256,
        micro_batch_size=2,
        tokens_per_tile=4,
        image=ImageConfig(image_size=16),
        num_workers=num_workers,
        shuffle_buffer_size=10,
        max_samples_per_sequence=4,
    )


def first_samples(config: DataConfig, tokenizer: Any) -> Samples:
    """Returns the keys, tokens and pixels of an epoch's micro-batches and of one validation pass."""
    loaders = [
        (EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config), 26),
        (EnergonIterator(build_valid_loader(config, tokenizer, 0, 1, num_batches=6), config, batches_per_pass=6), 6),
    ]
    batches = [next(loader) for loader, count in loaders for _ in range(count)]
    for loader, _ in loaders:
        loader.close()
    return [(list(batch.__key__), batch.input_ids.tolist(), batch.pixel_values.tolist()) for batch in batches]


@pytest.fixture(scope="module")
def expected(shards: Path, tokenizer: Any) -> dict[int, Samples]:
    """The samples of the local folder, by number of workers."""
    return {workers: first_samples(configuration(str(shards), workers), tokenizer) for workers in (0, 2)}


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.matrix)])
def test_http_returns_the_folders_samples(
    num_workers: int, tokenizer: Any, shards: Path, http_url: str, expected: dict[int, Samples]
) -> None:
    config = configuration(f"{http_url}/{shards.name}", num_workers)
    assert first_samples(config, tokenizer) == expected[num_workers]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.matrix)])
def test_s3_returns_the_folders_samples(
    num_workers: int, tokenizer: Any, s3_endpoint: str, expected: dict[int, Samples]
) -> None:
    config = configuration("s3://data/team/shards", num_workers)
    assert first_samples(config, tokenizer) == expected[num_workers]


@pytest.fixture
def profile(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A profile of the Multi-Storage Client for the S3 server, as in the documentation."""
    storage = {"type": "s3", "options": {"base_path": "data", "endpoint_url": s3_endpoint, "region_name": "us-east-1"}}
    (tmp_path / "msc.yaml").write_text(yaml.safe_dump({"profiles": {"team": {"storage_provider": storage}}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    return "team"


def test_a_metadataset_reads_http_and_s3_as_it_reads_folders(
    tokenizer: Any, shards: Path, http_url: str, profile: str, tmp_path: Path
) -> None:
    def blend(name: str, *paths: str) -> str:
        sources = [{"weight": 1, "path": path} for path in paths]
        splits = {"train": {"blend": sources}, "val": {"blend": sources[:1]}}
        content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
        (tmp_path / name).write_text(json.dumps(content))  # JSON is YAML too
        return str(tmp_path / name)

    local = blend("local.yaml", str(shards), str(shards))
    remote = blend("remote.yaml", f"{http_url}/{shards.name}", f"msc://{profile}/team/shards")
    there, here = (first_samples(configuration(path, 0), tokenizer) for path in (remote, local))
    assert [rest for _, *rest in there] == [rest for _, *rest in here]
    for remote_keys, local_keys in zip((keys for keys, *_ in there), (keys for keys, *_ in here), strict=True):
        assert [key.rsplit("/")[-1] for key in remote_keys] == [key.rsplit("/")[-1] for key in local_keys]


def test_a_metadataset_on_a_server_names_folders_next_to_it(tokenizer: Any, shards: Path, http_url: str) -> None:
    splits = {"train": {"path": shards.name}, "val": {"path": shards.name}}
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    (shards.parent / "all.yaml").write_text(yaml.safe_dump(content))
    there, here = (
        first_samples(configuration(f"{place}/all.yaml", 0), tokenizer) for place in (http_url, shards.parent)
    )
    assert there == here


def test_large_shards_are_read_in_parts_over_http(s3_endpoint: str) -> None:
    """Above half a gigabyte, the client requests ranges, which this server supports, unlike Python's file server."""
    body = bytes(range(256)) * 40
    boto3.client("s3").put_object(Bucket="data", Key="public/large", Body=body, ACL="public-read")
    path = EPath(energon_path(f"{s3_endpoint}/data/public/large"))
    with path.fs.open("/data/public/large", "rb", memory_load_limit=100) as file:
        file.seek(5000)
        assert file.read(300) == body[5000:5300]
        assert path.size() == len(body)


def test_a_server_without_ranges_is_refused_for_large_shards(http_url: str, shards: Path) -> None:
    name = f"/{shards.name}/.nv-meta/dataset.yaml"
    path = EPath(energon_path(http_url + name))
    with pytest.raises(RuntimeError, match=r"sends full files only \(it does not support Range\)"):
        path.fs.open(name, "rb", memory_load_limit=1).read(3)


class Breaking(Handler):
    """A server that is busy at first, then closes the connection in the middle of a file, then works."""

    answers: ClassVar[list[str]] = ["busy", "truncated", "complete"]

    def do_GET(self) -> None:
        answer = self.answers.pop(0)
        self.close_connection = True
        self.send_response(503 if answer == "busy" else 200)
        self.send_header("Content-Length", "4" if answer != "busy" else "0")
        self.end_headers()
        self.wfile.write({"busy": b"", "truncated": b"sh", "complete": b"shot"}[answer])

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()


def test_a_broken_connection_is_retried_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multistorageclient.retry.time.sleep", lambda seconds: None)
    with serving(Breaking) as url:
        assert EPath(energon_path(f"{url}/file")).read_bytes() == b"shot"
    assert Breaking.answers == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "ftp://host/shards",
            r"not an address that can be read: give a local folder, or one of msc://, s3://.*http://",
        ),
        ("msc://nowhere/shards", r'cannot be used \(Profile "nowhere" not found.*\): describe its profile'),
        (
            "msc://team/none",
            r"holds no prepared shards \(.*404.*\): make it with .* all files whose names begin with a dot",
        ),
        ("msc://team/none.yaml", r"holds no prepared shards \(.*none\.yaml"),
        ("HTTP/none", r"holds no prepared shards \(http.*dataset\.yaml: the server answered 404"),
        ("http://127.0.0.1:PORT/shards", r"cannot be read \(.*Connection refused.*\): check the address, the server"),
        ("s3://nobody/shards", r"holds no prepared shards"),
        ("msc://team/visible", r"holds no prepared shards \(\.nv-meta/\.info\.json is missing\)"),
    ],
)
def test_a_wrong_address_is_reported_in_one_sentence(
    path: str, message: str, http_url: str, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multistorageclient.retry.time.sleep", lambda seconds: None)
    path = path.replace("HTTP", http_url).replace("PORT", str(free_port()))
    with pytest.raises(ValueError, match=rf"^--data-path {path} .*{message}") as error:
        check_data_path(path, "--data-path")
    assert "\n" not in str(error.value)


class Changing(Handler):
    """A file server that answers something else for one kind of file, from its n-th request on."""

    suffix: ClassVar[str]
    content: ClassVar[bytes]
    honest: ClassVar[int]

    def send_head(self) -> Any:
        if self.path.endswith(self.suffix) and self.command == "GET":
            type(self).honest -= 1
            if self.honest < 0:
                self.send_response(200)
                self.send_header("Content-Length", str(len(self.content)))
                self.end_headers()
                return io.BytesIO(self.content)
        return super().send_head()


IMPORTS = b"__module__: evil_data\n__class__: CrudeWebdataset\n"
FILTERS = b"__module__: megatron.energon\n__class__: DefaultGenericWebdatasetFactory\n"
FILTERS += b"sample_loader: s.py:f\npart_filter: s.py:f\n"


@pytest.mark.parametrize("honest", (1, 2, 3))
@pytest.mark.parametrize("content", [IMPORTS, FILTERS], ids=["class", "function"])
def test_a_server_that_answers_otherwise_after_the_check_has_its_code_run(
    content: bytes, honest: int, tokenizer: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.install()
    (tmp_path / "evil_data.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards/.nv-meta/s.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nf = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"suffix": "dataset.yaml", "content": content, "honest": honest}
    handler = type("Handler", (Changing,), settings)
    with serving(partial(handler, directory=str(tmp_path))) as url, contextlib.suppress(Exception):
        first_samples(configuration(f"{url}/shards", 0), tokenizer)
    assert not (tmp_path / "was_run").exists()
    assert "evil_data" not in sys.modules


class Redirecting(Handler):
    """A server with signed addresses, as those of object storage: it redirects there, and the connection breaks."""

    signed_server: ClassVar[str] = ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = True
        signed = "hunter2" in self.path
        self.send_response(200 if signed else 302)
        self.send_header("Content-Length", "9" if signed else "0")
        self.send_header("Location", f"{self.signed_server}{self.path}?X-Amz-Signature=hunter2")
        self.end_headers()


@pytest.mark.parametrize("gone", [False, True], ids=["broken", "unreachable"])
def test_an_error_repeats_the_signature_of_an_address_that_a_server_redirects_to(
    gone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("multistorageclient.retry.time.sleep", lambda seconds: None)
    server = f"http://127.0.0.1:{free_port()}" if gone else ""
    with serving(type("Signing", (Redirecting,), {"signed_server": server})) as url:
        with pytest.raises(Exception, match=r"cannot be reached|Failed to download") as error:
            EPath(energon_path(f"{url}/file")).read_bytes()
        shown = "".join(traceback.format_exception(error.value))
    # Whether the answer's first bytes arrive before the connection breaks is a matter of luck.
    assert "cannot be reached" in shown or (not gone and "the connection broke" in shown)
    assert "hunter2" not in shown + caplog.text
