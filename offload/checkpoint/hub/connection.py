"""The way to the hub: what the user has set for it, tried before the first request, and its errors in one line each.

What huggingface_hub reads while it is imported is in `variables.py`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cache.errors import DiskSpaceError, OffloadError, UnknownModelError

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check_before_request() -> None:
    """Raises UnknownModelError for a proxy, certificates or a token that no request can be made with."""
    import httpx2
    from huggingface_hub import get_session

    _check_token()
    try:
        get_session()  # makes the client, which takes proxies and certificates
    except ImportError as error:
        raise UnknownModelError(
            f'a SOCKS proxy ({_set(_PROXIES)}) needs one package more: pip install "httpx2[socks]"'
        ) from error
    except (ValueError, httpx2.InvalidURL) as error:
        raise UnknownModelError(
            f"{_set(_PROXIES)} names no proxy that can be used: write it like http://host:3128 or socks5://host:1080"
        ) from error
    except OSError as error:
        where = os.environ.get("SSL_CERT_FILE", "")
        raise UnknownModelError(
            f'SSL_CERT_FILE is "{where}", where no certificates can be read ({error.strerror or error}): '
            "name a file of them in PEM format, or unset it"
        ) from error


def _check_token() -> None:
    """Raises UnknownModelError for a token that cannot be part of a request. It is a secret, so it is not shown."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    try:
        token = build_hf_headers().get("authorization", "")
        sendable = token.isascii() and token.isprintable()
    except UnicodeDecodeError:
        sendable = False
    if not sendable:
        where = next((name for name in _TOKENS if os.environ.get(name)), constants.HF_TOKEN_PATH)
        raise UnknownModelError(f"the token in {where} has letters that no token of the hub has: copy it once more")


def _set(names: tuple[str, ...]) -> str:
    """The variables among `names` that are set."""
    spellings = [spelling for name in names for spelling in (name, name.lower()) if os.environ.get(spelling)]
    return ", ".join(spellings) or names[-1]


def not_a_hub() -> UnknownModelError:
    """What to raise for an answer that no hub gives."""
    from huggingface_hub import constants

    return UnknownModelError(f"{constants.ENDPOINT} does not answer like a hub: check HF_ENDPOINT and the network")


@contextmanager
def hub_errors(model: str, reference: str) -> Iterator[None]:
    """Turn whatever goes wrong with the hub or the cache into one line that says what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    hub, log_in = constants.ENDPOINT, "run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UnknownModelError(
            f"hub model {model} is gated: accept its terms at {hub}/{model}, then {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnknownModelError(
            f"there is no folder {model} here and no such model at {hub}: check the name, or if the model is "
            f"private {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UnknownModelError(f'hub model {model} has no revision "{reference}": check its name') from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = log_in if status in (401, 403) else "try again later"
        raise UnknownModelError(f"{hub} answers {model} with status {status}: {advice}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise UnknownModelError(
            f"cannot reach {hub} ({reason}), and there is no folder {model} here: check the network and the "
            "name, then run again to continue"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskSpaceError(
                f"the disk of {constants.HF_HUB_CACHE} is full: free some space and run again to continue, "
                "or set HF_HOME to a folder on a larger disk"
            ) from error
        where = error.filename or constants.HF_HUB_CACHE
        raise OffloadError(f"{where}: {error.strerror}: set HF_HOME to a folder that you may write to") from error
