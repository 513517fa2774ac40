"""What ends without `close`: a model that nobody refers to any more gives all back, and one in a fork says where it is.

Forks are made by `os.fork` alone, as pre-loading web servers and multiprocessing do.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from offload.model import OffloadedModel

ARGUMENTS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def descriptors() -> int:
    """Open files of this process; 0 where nobody counts them."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.parametrize(("device", "cyclic"), [("cpu", False), ("emulated", True)])
def test_what_nobody_closed_gives_threads_and_files_back(checkpoint: Path, device: str, cyclic: bool) -> None:
    gc.collect()
    before = tiny.offload_threads(), descriptors()
    for _ in range(2):
        model: Any = tiny.open_model(checkpoint, device=device, expert_cache=tiny.FEW)
        model.generate(tiny.ids(1, 5), **ARGUMENTS)
        if cyclic:
            model.me = model
        with pytest.warns(ResourceWarning, match="unclosed OffloadedModel"):
            del model
            gc.collect()
        assert (tiny.offload_threads(), descriptors()) == before


def test_what_was_closed_ends_in_silence(checkpoint: Path) -> None:
    with tiny.open_model(checkpoint) as model:
        pass
    del model
    gc.collect()  # a warning would be an error


def test_a_model_given_up_on_one_of_its_own_threads_ends_all_the_same(checkpoint: Path) -> None:
    """Python collects on whichever thread it is, and a reader cannot wait for its own end."""
    with pytest.warns(ResourceWarning):
        models = [tiny.open_model(checkpoint, expert_cache=tiny.FEW)]
        thread = threading.Thread(target=models.clear, name="offload-read-0")
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        for _ in range(1000):
            if not tiny.offload_threads():
                break
            time.sleep(0.01)
    assert not tiny.offload_threads()


def test_a_model_given_up_in_the_midst_of_anything_leaves_the_number_of_threads(checkpoint: Path) -> None:
    """As within another model's pass, which goes on with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    model: Any = tiny.open_model(checkpoint, threads=1)
    with pytest.warns(ResourceWarning):
        del model
        gc.collect()
    left = torch.get_num_threads()
    torch.set_num_threads(before)
    assert left == 1


def test_the_end_of_the_process_is_none_of_its_business(checkpoint: Path) -> None:
    """The process gives all back then, and Python's own parts may be gone already."""
    with tiny.open_model(checkpoint) as model:
        assert not model._finalizer.atexit


def test_it_lives_as_long_as_somebody_generates(checkpoint: Path, resident: Any) -> None:
    found: list[torch.Tensor] = []
    models = [tiny.open_model(checkpoint, expert_cache=tiny.FEW)]

    def ask(model: OffloadedModel) -> None:
        found.append(model.generate(tiny.ids(1, 8), stopping_criteria=[forget], **ARGUMENTS))

    def forget(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        models.clear()
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.warns(ResourceWarning):
        ask(models[0])
        gc.collect()
    assert torch.equal(found[0], resident.generate(tiny.ids(1, 8), **ARGUMENTS))
    assert not tiny.offload_threads()


def in_fork(work: Callable[[], object]) -> str:
    """What `work` gives or raises in a fork of this process; "hangs" if nothing."""
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what Python thinks of forks where threads run
        child = os.fork()
    if not child:
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    for _ in range(2000):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(ours, "rb") as pipe:
        return pipe.read().decode() or "hangs"


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@forks
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_in_a_fork_a_model_says_where_it_was_loaded(checkpoint: Path, resident: Any, device: str) -> None:
    with tiny.open_model(checkpoint, device=device, expert_cache=tiny.FEW) as model:
        model.generate(tiny.ids(1, 8), **ARGUMENTS)
        for use in (
            lambda: model.generate(tiny.ids(1, 8), **ARGUMENTS),
            lambda: model(tiny.ids(1, 8)),
            lambda: model.module(tiny.ids(1, 8)),
            lambda: model.use_predictor("none"),
        ):
            assert in_fork(use).startswith(f"RuntimeError: this model was loaded in process {os.getpid()}")
        assert in_fork(lambda: (model.close(), model.closed)) == "(None, True)"
        expected = resident.generate(tiny.ids(1, 8), **ARGUMENTS)
        assert torch.equal(model.generate(tiny.ids(1, 8), **ARGUMENTS), expected)


@forks
def test_a_fork_that_gives_a_model_up_leaves_it_alone(checkpoint: Path, resident: Any) -> None:
    models = [tiny.open_model(checkpoint, expert_cache=tiny.FEW)]

    def give_up() -> object:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            models.clear()
            gc.collect()
        return [str(each.message) for each in said if "OffloadedModel" in str(each.message)]

    assert in_fork(give_up) == "[]"
    with models[0] as model:
        expected = resident.generate(tiny.ids(1, 8), **ARGUMENTS)
        assert torch.equal(model.generate(tiny.ids(1, 8), **ARGUMENTS), expected)


@forks
def test_a_fork_while_another_thread_generates_says_so_too(checkpoint: Path) -> None:
    with tiny.open_model(checkpoint, expert_cache=tiny.FEW) as model:
        go = threading.Event()

        def hold(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            go.wait(10)
            return torch.zeros(len(ids), dtype=torch.bool)

        arguments = {"inputs": tiny.ids(1, 8), "stopping_criteria": [hold], **ARGUMENTS}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        said = in_fork(lambda: model.generate(tiny.ids(1, 8), **ARGUMENTS))
        go.set()
        thread.join()
        assert said.startswith("RuntimeError: this model was loaded in process")


@forks
def test_a_fork_computes_and_has_a_model_of_its_own(checkpoint: Path, resident: Any) -> None:
    """OpenMP's threads are not in a fork, and torch would wait for them for ever."""
    expected = resident.generate(tiny.ids(1, 8), **ARGUMENTS).tolist()
    matrix = torch.randn(500, 500)

    def work() -> object:
        (matrix @ matrix).sum()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with tiny.open_model(checkpoint, threads=2) as own:
                found = own.generate(tiny.ids(1, 8), **ARGUMENTS).tolist()
        return found == expected, [str(each.message)[:11] for each in said if "fork" in str(each.message)]

    with tiny.open_model(checkpoint, threads=2) as model:
        model.generate(tiny.ids(1, 8), **ARGUMENTS)
        matrix @ matrix
        assert in_fork(work) == "(True, ['--threads 2'])"
    assert torch.get_num_threads() == 1
