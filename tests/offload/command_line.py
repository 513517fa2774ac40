"""The command line, run in this process as a user runs it."""

from __future__ import annotations

import pytest

from offload.terminal.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of `offload` with `arguments`, which must end with `code`."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    return out, err
