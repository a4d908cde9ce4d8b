"""Ways to reach a live server: TLS, client certificates, a Unix socket; and what is refused."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from tests.http.live import LiveServer, interrupt
from tgi_cli.config import ServerConfig
from tgi_cli.errors import TgiError, UsageError
from tgi_cli.serve.listener import listen_unix
from tgi_cli.serve.tls import tls_context


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("pem")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", cert),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


async def test_tls_with_client_certificates(
    pem: tuple[str, str], tiny_checkpoint: Callable[..., Path]
) -> None:
    cert, key = pem
    flags = ("--dtype", "float32", "--ssl-certfile", cert, "--ssl-keyfile", key)
    context = ssl.create_default_context(cafile=cert)
    with LiveServer(
        tiny_checkpoint("llama"), *flags, "--ssl-ca-certs", cert, ready=False
    ) as server:
        assert server.url.startswith("https://127.0.0.1:")
        async with aiohttp.ClientSession(server.url) as session:
            with pytest.raises(aiohttp.ClientError):
                async with session.get("/health", ssl=context) as answer:
                    await answer.read()
            context.load_cert_chain(cert, key)
            async with session.get("/health", ssl=context) as answer:
                assert answer.status in (200, 503)


async def test_unix_socket(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    path = tmp_path / "s"
    flags = ("--dtype", "float32", "--uds", str(path))
    with LiveServer(tiny_checkpoint("llama"), *flags, ready=False) as server:
        assert server.url == f"unix:{path}"
        connector = aiohttp.UnixConnector(str(path))
        async with (
            aiohttp.ClientSession("http://localhost", connector=connector) as session,
            session.get("/health") as answer,
        ):
            assert answer.status in (200, 503)
        interrupt(server, signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert not path.exists()


def test_a_socket_left_behind_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen_unix(path), pytest.raises(TgiError, match="already in use"):
        listen_unix(path)
    with listen_unix(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        listener.accept()[0].close()


def test_wrong_unix_paths(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a socket"):
        listen_unix(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="no such file"):
        listen_unix(str(tmp_path / "none" / "s"))
    with pytest.raises(UsageError, match="too long"):
        listen_unix(str(tmp_path / ("s" * 200)))


def test_wrong_certificates(pem: tuple[str, str], tmp_path: Path) -> None:
    cert, key = pem
    (tmp_path / "empty").touch()
    empty = str(tmp_path / "empty")
    for options, words in (
        ({"ssl_certfile": empty, "ssl_keyfile": key}, "cannot be used"),
        ({"ssl_certfile": cert}, "in the same file"),
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_ca_certs": empty}, "--ssl-ca-certs"),
        ({"ssl_keyfile": key}, "without --ssl-certfile"),
    ):
        with pytest.raises(UsageError, match=words):
            tls_context(ServerConfig(**options))
    assert tls_context(ServerConfig()) is None
