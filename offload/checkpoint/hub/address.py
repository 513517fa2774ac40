"""What people write for a model at the hub: an id, an id with a revision, or the address of its page."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from cache.errors import UnknownModelError

_HOSTS = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/"
_PAGE = re.compile(
    rf"(?:{_HOSTS}|hf://(?:models/)?)(?!datasets/|spaces/)(?P<id>[^/?#@]+/[^/?#@]+)"
    r"(?:@(?P<at>[^?#]+)|/(?:tree|blob|resolve|raw)/(?P<tree>[^/?#]+)(?:/[^?#]*)?)?/?(?:[?#].*)?"
)
_AT = re.compile(r"(?P<id>[^/@:]+(?:/[^/@:]+)?)@(?P<at>[^@]+)")
_STORED = re.compile(r"models--.+")


def id_and_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """The hub id in `name`, and the revision that it or `revision` names. Raises UnknownModelError if both do."""
    found = _PAGE.fullmatch(name) or _AT.fullmatch(name)
    if found is None:
        return name, revision
    parts = found.groupdict()
    named = unquote(parts.get("at") or parts.get("tree") or "").rstrip("/") or None
    if named is not None and revision is not None and named != revision:
        raise UnknownModelError(f'{name} names the revision "{named}", and --revision is "{revision}": leave one out')
    return parts["id"], named or revision


def stored_snapshot(folder: Path, revision: str | None) -> Path | None:
    """The files of a model in `folder`, where that is one of the hub's cache; None if it is another.

    They are those of `revision`, else of the branch main, else the only ones. Raises UnknownModelError if it has none
    of them.
    """
    if not _STORED.fullmatch(folder.absolute().name) or not (folder / "snapshots").is_dir():
        return None
    commit = revision or "main"
    if (reference := folder / "refs" / commit).is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    present = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    if commit not in present and revision is None and len(present) == 1:
        (commit,) = present
    if commit not in present:
        raise UnknownModelError(
            f'{folder} has no files of the revision "{commit}", but those of {", ".join(present) or "none"}: '
            "name one with --revision"
        )
    return folder / "snapshots" / commit
