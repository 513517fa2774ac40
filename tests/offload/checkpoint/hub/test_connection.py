"""Proxies, certificates and tokens that no request can be made with: one line each, and no secret in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from cache.errors import OffloadError, UnknownModelError
from offload.checkpoint.hub.files import describe
from offload.checkpoint.hub.variables import check_before_import

Said = Callable[..., str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    """What is said of a hub model with a variable set. No request leaves: the proxy refuses."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    def said(**variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UnknownModelError) as refused:
            describe("acme/moe")
        return str(refused.value)

    huggingface_hub.close_session()
    yield said
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    "proxy", ["ftp://me:secret@127.0.0.1:9", "socks4://127.0.0.1:9", "http://[::1", "http://me:sec#ret@x:y"]
)
def test_a_proxy_of_no_known_kind_is_named_by_its_variable(said: Said, proxy: str) -> None:
    told = said(HTTPS_PROXY=proxy)
    assert told.startswith("HTTPS_PROXY, HTTP_PROXY names no proxy that can be used: ")
    assert "write it like http://host:3128 or socks5://host:1080" in told and "sec" not in told


def test_a_socks_proxy_without_its_package_says_what_to_install(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    assert said(ALL_PROXY="socks5://127.0.0.1:9").endswith('pip install "httpx2[socks]"')


def test_a_proxy_that_refuses_is_an_unreachable_hub(said: Said) -> None:
    assert said().startswith("cannot reach https://huggingface.co (")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_are_none(said: Said, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "own.pem"
    if content is not None:
        file.write_text(content)
    told = said(SSL_CERT_FILE=str(file))
    assert told.startswith(f'SSL_CERT_FILE is "{file}", where no certificates can be read (')


@pytest.mark.parametrize("token", ["hf_sécret", "hf_se\x01cret", "hf_\udcffsecret"])
def test_a_token_that_cannot_be_sent_is_named_and_not_shown(said: Said, token: str) -> None:
    told = said(HF_TOKEN=token)
    assert told == "the token in HF_TOKEN has letters that no token of the hub has: copy it once more"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "none"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1,5"),
        ("HF_HUB_ETAG_TIMEOUT", ""),
        ("HF_HUB_ETAG_TIMEOUT", "-1"),
        ("HF_ENDPOINT", "nonsense"),
        ("HF_ENDPOINT", "https://host:port"),
        ("HF_ENDPOINT", "https://"),
    ],
)
def test_a_variable_that_the_hubs_library_cannot_read(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(OffloadError, match=f'{name} is "{value}".* unset it'):
        check_before_import()


def test_variables_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:8080/hub")
    check_before_import()
