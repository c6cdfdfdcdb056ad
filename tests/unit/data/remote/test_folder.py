"""Files and parts of files from a real HTTP server, and from other file systems of fsspec."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from vit_efficient.data.remote import folder as folders
from vit_efficient.data.remote import retry
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.remote.folder import RemoteFolder, WholeFilesOnly, without_credentials
from vit_efficient.data.remote.retry import Absent
from vit_efficient.errors import DataError

pytestmark = pytest.mark.timeout(60)
FAST = RemoteConfig(timeout=1.0, attempts=3)


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    """What the server has as `x.bin`."""
    (tmp_path / "shards").mkdir()
    made = os.urandom(100_000)
    (tmp_path / "shards" / "x.bin").write_bytes(made)
    return made


@pytest.fixture
def folder(server: Any, data: bytes) -> RemoteFolder:
    return RemoteFolder(server.url, FAST)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (5, 1000), (99_999, 1), (99_990, 100), (100_000, 5), (10**9, 5)]
)
def test_a_part_is_shorter_only_where_the_file_ends(
    folder: RemoteFolder, server: Any, data: bytes, offset: int, length: int
) -> None:
    assert folder.read_part("x.bin", offset, length) == data[offset : offset + length]
    assert server.count("x.bin") == 1  # the end is the file's: the server said so, and is not asked again


@pytest.mark.parametrize("fault", ["drop", "cut"])
def test_what_came_short_is_fetched_again(folder: RemoteFolder, server: Any, data: bytes, fault: str) -> None:
    server.faults["x.bin"] = [fault, fault]
    assert folder.read_part("x.bin", 10, 5000) == data[10:5010]
    assert server.count("x.bin") == 3
    server.always["x.bin"] = fault
    with pytest.raises(DataError, match=r"x\.bin: gave up after 3 attempts"):
        folder.read_part("x.bin", 10, 5000)


def test_another_part_than_the_one_asked_for_is_never_taken(folder: RemoteFolder, server: Any) -> None:
    server.always["x.bin"] = "shifted"
    with pytest.raises(DataError, match=r"answers with another part than it was asked for \(bytes 11-"):
        folder.read_part("x.bin", 10, 5000)


@pytest.mark.parametrize("fault", ["no ranges", "unsaid"])
def test_a_server_without_parts_is_found_out_before_it_has_sent_everything(
    folder: RemoteFolder, server: Any, fault: str
) -> None:
    (server.folder / "large.bin").write_bytes(bytes(100 << 20))
    server.always["large.bin"] = fault
    with pytest.raises(WholeFilesOnly, match=r"large\.bin: the server sends whole files only.*data\.remote\.cache"):
        folder.read_part("large.bin", 10, 5000)
    assert server.count("large.bin") == 1
    assert server.sent < 30 << 20  # what fits into the sockets


def test_a_trickle_is_not_waited_for_beyond_patience(server: Any, data: bytes) -> None:
    """Each byte comes well within the time-out; all of them would take 80 minutes."""
    folder = RemoteFolder(server.url, FAST.model_copy(update={"patience": 0.6}))
    server.always["x.bin"] = "trickle"
    began = time.monotonic()
    with pytest.raises(
        DataError, match=r"x\.bin: gave up after 1 attempt in \d+ s; the last: the server did not answer"
    ):
        folder.read("x.bin")
    assert time.monotonic() - began < 20


def test_a_server_may_ask_to_be_left_alone(
    folder: RemoteFolder, server: Any, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append))
    server.faults["x.bin"] = [503]
    server.retry_after = "1"
    assert folder.read("x.bin") == data
    assert pauses == [1]


def test_credentials_of_the_url_and_of_netrc_reach_the_server(
    server: Any, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    RemoteFolder(server.url.replace("//", "//someone:secret@"), FAST).read("x.bin")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    RemoteFolder(server.url, FAST).read("x.bin")
    assert server.authorizations == ["Basic c29tZW9uZTpzZWNyZXQ="] * 2


def test_urls_as_they_may_be_shown() -> None:
    assert without_credentials("https://a:b@host:1/x/{0..2}.tar?key=secret") == "https://host:1/x/{0..2}.tar"
    assert without_credentials("data/me@home/x-{0..2}.tar") == "data/me@home/x-{0..2}.tar"
    assert "secret" not in repr(RemoteFolder("https://a:secret@host/x"))


@pytest.mark.parametrize(
    ("url", "beside"),
    [
        ("http://host/a/train", "http://host/a/val"),
        ("http://host/train/", "http://host/val"),
        ("http://host:80", None),  # not the host `val`
        ("s3://bucket", None),  # nor the bucket
    ],
)
def test_what_lies_beside(url: str, beside: str | None) -> None:
    found = RemoteFolder(url).sibling("val")
    assert (found and found.url) == beside


class TestDownload:
    @pytest.fixture(autouse=True)
    def small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folders, "_PART", 9_000)

    def copy(self, folder: RemoteFolder, path: Path, size: int = 100_000) -> bytes:
        with open(path, "wb") as file:
            done = folder.download("x.bin", file, size)
        found = path.read_bytes()
        assert len(found) == done
        return found

    def test_part_by_part_with_faults(self, folder: RemoteFolder, server: Any, data: bytes, tmp_path: Path) -> None:
        server.faults["x.bin"] = ["drop", 500]  # of the first part; the others are fetched side by side
        folder.config = FAST.model_copy(update={"attempts": 6})
        server.faults["x.bin"] += ["cut", 429, "drop"]
        assert self.copy(folder, tmp_path / "copy") == data
        assert server.count("x.bin") == 12 + 5
        assert server.sent < 140_000  # what had arrived was not fetched again

    def test_a_truncated_file_is_all_that_there_is(
        self, folder: RemoteFolder, server: Any, data: bytes, tmp_path: Path
    ) -> None:
        os.truncate(server.folder / "x.bin", 40_000)
        assert self.copy(folder, tmp_path / "copy") == data[:40_000]

    @pytest.mark.parametrize("fault", ["no ranges", "unsaid"])
    def test_whole_where_there_are_no_parts(
        self, folder: RemoteFolder, server: Any, data: bytes, tmp_path: Path, fault: str
    ) -> None:
        server.always["x.bin"] = fault
        server.faults["x.bin"] = [fault, 500, "drop"]
        assert self.copy(folder, tmp_path / "copy") == data
        assert server.count("x.bin") == 4

    def test_an_absent_file(self, folder: RemoteFolder, server: Any, tmp_path: Path) -> None:
        server.always["x.bin"] = 404
        with pytest.raises(Absent, match=r"x\.bin: there is no such file"):
            self.copy(folder, tmp_path / "copy")


class NoCredentialsError(Exception):
    """Client libraries have errors of their own, this one as botocore's."""


class Odd(MemoryFileSystem):
    """Refuses what lies past the end, as S3 does, and fails in its own way when told to."""

    protocol = "odd"
    cachable = False
    faults: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("odd://", "memory://"))
        return stripped

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.faults:
            raise self.faults.pop()
        if start is not None and start >= self.info(path)["size"]:
            raise OSError(22, "The requested range is not satisfiable")
        found: bytes = super().cat_file(path, start, end, **options)
        return found


@pytest.fixture
def odd() -> RemoteFolder:
    register_implementation("odd", Odd, clobber=True)
    Odd().pipe_file("/far/x.bin", b"0123456789")
    return RemoteFolder("odd://far", FAST)


class TestOtherFileSystems:
    @pytest.mark.parametrize(("offset", "length"), [(2, 3), (8, 5), (10, 5), (100, 5)])
    def test_parts(self, odd: RemoteFolder, offset: int, length: int) -> None:
        assert odd.read_part("x.bin", offset, length) == b"0123456789"[offset : offset + length]

    def test_errors_of_a_client_library_pass(self, odd: RemoteFolder) -> None:
        Odd.faults = [RuntimeError("lost"), ConnectionResetError("reset")]
        assert odd.read("x.bin") == b"0123456789"
        Odd.faults = [RuntimeError("lost")] * 3
        with pytest.raises(DataError, match=r"odd://far/x\.bin: gave up after 3 attempts.*RuntimeError: lost"):
            odd.read("x.bin")

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (NoCredentialsError("Unable to locate credentials"), r"refuses access \(Unable to locate credentials\)"),
            (PermissionError("Access Denied"), r"refuses access \(Access Denied\)"),
            (FileNotFoundError("x"), "there is no such file"),
        ],
    )
    def test_what_no_trying_mends(self, odd: RemoteFolder, error: Exception, said: str) -> None:
        Odd.faults = [RuntimeError("a second attempt"), error]
        with pytest.raises(DataError, match=said):
            odd.read("x.bin")
        assert len(Odd.faults) == 1
        Odd.faults = []

    def test_a_whole_copy(self, odd: RemoteFolder, tmp_path: Path) -> None:
        with open(tmp_path / "copy", "wb") as file:
            assert odd.connect().copy("odd://far/x.bin", file, 10) == 10
            assert odd.download("x.bin", file, 10) == 10
        assert (tmp_path / "copy").read_bytes() == b"0123456789"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine has all the packages, and none of them is this one."""
    register_implementation("faraway", "no_such_package.files.Files", errtxt="Install no_such_package", clobber=True)
    with pytest.raises(DataError, match=r"faraway://x: faraway:// needs a package .* Install no_such_package\.$"):
        RemoteFolder("faraway://x").read("manifest.json")


def test_s3_says_how_to_have_it(missing: Callable[[str], None]) -> None:
    missing("s3fs")
    with pytest.raises(DataError, match=r"s3:// needs a package .*pip install -e '\.\[s3\]'"):
        RemoteFolder("s3://bucket/train").read("manifest.json")
