"""What the user has set for the hub, as far as huggingface_hub reads it while it is imported.

Its own errors do not name the variable. What it reads before a request is in `connection.py`.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from cache.errors import OffloadError

_SECONDS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")


def check_before_import() -> None:
    """Raises OffloadError for a variable that cannot be read. Imports nothing of huggingface_hub."""
    for name in _SECONDS:
        value = os.environ.get(name)
        if value is not None and not value.strip().isdecimal():
            raise OffloadError(f'{name} is "{value}", which is no whole number of seconds: correct it, or unset it')
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and not _is_address(endpoint):
        raise OffloadError(f'HF_ENDPOINT is "{endpoint}": write it like https://huggingface.co, or unset it')


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        return False
