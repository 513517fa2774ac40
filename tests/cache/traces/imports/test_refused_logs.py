"""What is no log of another program, or says something else than was asked, is refused, saying where."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import foreign_logs as logs
import numpy as np
import pytest
from foreign_logs import imported, made_trace
from numpy.typing import NDArray

from cache.errors import TraceError
from cache.traces.imports.logged import ImportOptions
from cache.traces.imports.read import Log
from cache.traces.trace import Trace
from cache.traces.writer import partial_folder

TOP_2, OF_4 = ImportOptions(top_k=2), ImportOptions(num_experts=4)
LOGITS = np.array([[1.0, 3.0, 2.0, 0.5]])


def with_logit(value: float) -> NDArray[np.float64]:
    return np.array([[1.0, 3.0, 2.0, 0.5], [1.0, value, 2.0, 0.5]])


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("arrays", "prompt", "options", "message"),
    [
        ({"layer.0": with_logit(np.nan)}, None, TOP_2, '"layer.0": token 1, expert 1: a logit of nan'),
        ({"layer.0": with_logit(np.inf)}, None, TOP_2, "a logit of inf"),
        ({"layer.0": LOGITS, "layer.2": LOGITS[:, :3]}, None, TOP_2, r'"layer.2" has the shape \[1, 3\]'),
        ({"layer.0": LOGITS[0]}, None, TOP_2, r"not \[tokens, experts\]"),
        ({"layer.0": LOGITS[:0]}, None, TOP_2, "has no token"),
        ({"layer.0": LOGITS.astype(np.int32)}, None, TOP_2, "holds int32, not logits"),
        ({"gate.0": LOGITS}, None, TOP_2, 'has "gate.0", where each array is called "layer.N"'),
        ({"layer.00": LOGITS}, None, TOP_2, 'has "layer.00"'),
        ({}, None, TOP_2, 'has no array "layer.N"'),
        ({"layer.0": LOGITS}, None, ImportOptions(), "give --top-k"),
        ({"layer.0": LOGITS}, None, ImportOptions(top_k=5), "--top-k 5: .* logits of 4 experts"),
        ({"layer.0": LOGITS}, None, ImportOptions(top_k=2, num_experts=5), "of 4 experts, not of 5"),
        ({"layer.0": LOGITS}, None, ImportOptions(top_k=2, layers=(0,)), "--layers does nothing"),
        ({"layer.0": LOGITS}, 2, TOP_2, "a prompt of 2 tokens, in a sequence of 1"),
        ({"layer.0": LOGITS}, 1, ImportOptions(top_k=2, prompt_tokens=1), "leave --prompt-tokens out"),
        ({"layer.0": LOGITS}, "x", TOP_2, "prompt_tokens"),
        ({"layer.0": np.full((1, 4), -np.inf)}, None, TOP_2, "token 0 may have fewer than 2 experts"),
        ({"layer.0": 1e5 * LOGITS}, None, ImportOptions(top_k=2, scores=True), "leave --scores out"),
    ],
)
def test_logits_that_are_none_are_refused(
    tmp_path: Path, arrays: Any, prompt: Any, options: ImportOptions, message: str, kind: str
) -> None:
    logs.save_logits(tmp_path / f"a.{kind}", arrays, prompt)
    with pytest.raises(TraceError, match=message):
        imported(tmp_path / f"a.{kind}", options, "transformers")
    assert not (tmp_path / "out.safetensors").exists()


def test_files_of_different_layers_are_refused(tmp_path: Path) -> None:
    logs.save_logits(tmp_path / "a.npz", {"layer.0": LOGITS, "layer.1": LOGITS})
    logs.save_logits(tmp_path / "b.npz", {"layer.0": LOGITS})
    with pytest.raises(TraceError, match=r"b\.npz: the MoE layers: \[0\], and in .*a\.npz \[0, 1\]"):
        imported(tmp_path, TOP_2)


def test_nothing_is_left_where_a_later_file_is_damaged(tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    logs.save_logits(folder / "a.npz", {"layer.0": LOGITS})
    logs.save_logits(folder / "b.npz", {"layer.0": with_logit(np.nan)})
    with pytest.raises(TraceError, match=r"b\.npz"):
        imported(folder, TOP_2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    source = logs.orders_log(made_trace(0, (3, 2, 4)), tmp_path / "log")
    presses = iter([None, KeyboardInterrupt])

    def press() -> None:
        if (kind := next(presses)) is not None:
            raise kind

    with pytest.raises(KeyboardInterrupt):
        Log(source).write(tmp_path / "out", ImportOptions(num_experts=6), on_sequence=press)
    assert Trace.open(tmp_path / "out").num_sequences == 2
    assert not partial_folder(tmp_path / "out").exists()


IDS = [[[0, 1], [2, 3]]]


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        ({"routed_experts": [[[0, 4]]]}, OF_4, "line 1: token 0, layer 0: expert 4 of 4"),
        ({"routed_experts": [[[0, 1], [2, 3]], [[0, 1], [3, 3]]]}, OF_4, "token 1, layer 1: expert 3 twice"),
        ({"routed_experts": [[[0, -2]]]}, OF_4, "expert -2 of 4"),
        ({"routed_experts": [[[-1, -1], [-1, -1]]]}, OF_4, "token 0 has the id -1: .*prefix cache"),
        ({"routed_experts": [[[0, 1]], [[0]]]}, OF_4, "rows of different lengths"),
        ({"routed_experts": [[0, 1]]}, OF_4, r"the shape \[1, 2\], not 3 dimensions"),
        ({"routed_experts": [[[0.5, 1]]]}, OF_4, "holds float64, where expert ids"),
        ({"routed_experts": [[[True, False]]]}, OF_4, "holds bool"),
        ({"routed_experts": [[[None, 1]]]}, OF_4, "more than numbers"),
        ({"routed_experts": [[[10**30, 1]]]}, OF_4, "more than numbers"),
        ({"routed_experts": []}, OF_4, "holds nothing"),
        ({"routed_experts": "%"}, OF_4, "not base64"),
        ({"routed_experts": "AAAA"}, OF_4, r"no \.npy file"),
        ({"routed_experts": [[[0, 0]]]}, OF_4, "nothing but zeros"),
        ({"routed_experts": None}, OF_4, "start vLLM with enable_return_routed_experts"),
        ({"text": "x"}, OF_4, "start vLLM with enable_return_routed_experts"),
        ({"choices": 5}, OF_4, '"choices" are not a list'),
        ({"choices": [{}]}, OF_4, 'choice 0 has no "routed_experts"'),
        ([IDS], OF_4, "line 1 is not a JSON object"),
        ({"routed_experts": IDS, "prompt_tokens": 2}, OF_4, "a prompt of 2 tokens, in a sequence of 1"),
        ({"routed_experts": IDS, "prompt_tokens": -1}, OF_4, "prompt_tokens is -1, not a whole number"),
        ({"routed_experts": IDS, "prompt_tokens": 1.5}, OF_4, "prompt_tokens is 1.5"),
        ({"routed_experts": IDS, "prompt_routed_experts": [[[0, 1]]]}, OF_4, "the prompt's ids have the shape"),
        ({"routed_experts": IDS, "prompt_routed_experts": IDS, "prompt_tokens": 2}, OF_4, "for a prompt of 2"),
        ({"routed_experts": IDS, "prompt_tokens": 1}, ImportOptions(num_experts=4, prompt_tokens=1), "leave --prompt"),
        ({"routed_experts": IDS}, ImportOptions(), "give --num-experts"),
        ({"routed_experts": IDS}, ImportOptions(num_experts=4, top_k=2), "--top-k does nothing"),
        ({"routed_experts": IDS}, ImportOptions(num_experts=4, scores=True), "--scores does nothing"),
        ({"routed_experts": IDS}, ImportOptions(num_experts=4, layers=(0, 5)), "has 2 layers, and no layer 5"),
        ({"routed_experts": [[[0, 1, 2]]]}, ImportOptions(num_experts=2), "goes to 3 experts, of 2"),
    ],
)
def test_ids_that_are_none_are_refused(tmp_path: Path, entry: Any, options: ImportOptions, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    with pytest.raises(TraceError, match=message):
        imported(tmp_path / "a.jsonl", options)


def test_lines_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"routed_experts": [[[0, 1]]]}\n\xff{')
    with pytest.raises(TraceError, match=r"a\.jsonl, line 2 is not JSON"):
        imported(tmp_path / "a.jsonl", OF_4)


def test_a_log_of_some_prompts_is_refused(tmp_path: Path) -> None:
    lines = [{"routed_experts": IDS, "prompt_tokens": 1}, {"routed_experts": IDS}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TraceError, match=r"line 1 says how long its prompt is, .*line 2 does not"):
        imported(tmp_path / "a.jsonl", OF_4)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_pickles_are_never_opened(tmp_path: Path, kind: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was opened",)

    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, np.array([Trap()], object), allow_pickle=True)
    else:
        np.savez(path, routed_experts=np.array([Trap()], object))
    with pytest.raises(TraceError, match="without pickle"):
        imported(path, OF_4, "vllm")
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(TraceError, match="without pickle"):
        imported(path, OF_4, "vllm")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_file_cut_short_is_refused(tmp_path: Path, kind: str) -> None:
    ids = np.zeros((50, 2, 1), np.int32)
    path = tmp_path / f"a.{kind}"
    np.save(path, ids) if kind == "npy" else np.savez(path, routed_experts=ids)
    data = path.read_bytes()
    for size in (0, 5, 60, len(data) - 30):
        path.write_bytes(data[:size])
        with pytest.raises(TraceError, match=rf"a\.{kind} is no \.{kind} file"):
            imported(path, OF_4, "vllm")


def test_a_header_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        shape = (2**40, 2, 2)
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
    with pytest.raises(TraceError, match=r"no \.npy file"):
        imported(tmp_path / "a.npy", OF_4)


PASS = {"0": None, "1": [[0, 1]]}


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ({}, "is not a list of forward passes"),
        ([], "is not a list of forward passes"),
        ([[]], "pass 0 is not an object of layers"),
        ([{}], "pass 0: no layer has experts"),
        ([{"0": None}], "pass 0: no layer has experts"),
        ([{"x": [[0, 1]]}], '"x" is no layer'),
        ([{"01": [[0, 1]]}], '"01" is no layer'),
        ([PASS, {"1": None, "0": [[0, 1]]}], "pass 1: layer 0 has experts in some passes, and none in others"),
        ([{**PASS, "2": [[0, 1], [2, 3]]}], "pass 0: 1 tokens in layer 1, and 2 in layer 2"),
        ([PASS, {"1": [[0, 1], [2, 3]]}], "pass 1: 2 tokens, where one is decoded"),
        ([PASS, {"1": [[0]]}], "tokens go to 1 experts, and to 2"),
        ([{"1": [[0, 1], None]}], "pass 0, layer 1 "),
        ([{"1": [0, 1]}], "not 2 dimensions"),
        ([{"1": [["a", "b"]]}], "where expert ids are expected"),
        ([PASS, {"1": [[0, 4]]}], "token 1, layer 1: expert 4 of 4"),
        ([PASS, {"1": [[2, 2]]}], "token 1, layer 1: expert 2 twice"),
    ],
)
def test_requests_that_are_none_are_refused(tmp_path: Path, passes: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(passes))
    with pytest.raises(TraceError, match=message):
        imported(tmp_path / "a.json", OF_4)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (ImportOptions(num_experts=4, top_k=2), "--top-k"),
        (ImportOptions(num_experts=4, prompt_tokens=2), "--prompt-tokens"),
        (ImportOptions(num_experts=4, layers=(1,)), "--layers"),
        (ImportOptions(num_experts=4, scores=True), "--scores"),
    ],
)
def test_what_a_request_says_itself_is_not_asked(tmp_path: Path, options: ImportOptions, flag: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([PASS]))
    with pytest.raises(TraceError, match=f"{flag} does nothing for a log of the format orders-in-chaos"):
        imported(tmp_path / "a.json", options)
    with pytest.raises(TraceError, match="give --num-experts"):
        imported(tmp_path / "a.json", ImportOptions())


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in (b"", b"\xff\xfe", b"[" * 10**5):
        (tmp_path / "a.json").write_bytes(text)
        with pytest.raises(TraceError, match="is not JSON"):
            imported(tmp_path / "a.json", OF_4)


def test_places_without_logs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(TraceError, match="empty has no file that ends in"):
        Log(tmp_path / "empty")
    with pytest.raises(TraceError, match=r"pickles .* are not read"):
        Log(tmp_path / "a.pt")
    with pytest.raises(TraceError, match=r'--format "hf": choose one of auto, transformers, vllm, orders-in-chaos'):
        Log(tmp_path / "a.pt", "hf")
    with pytest.raises(FileNotFoundError):
        Log(tmp_path / "nowhere.npz")


def test_a_trace_that_is_there_stays(tmp_path: Path) -> None:
    source = logs.orders_log(made_trace(0, (3,)), tmp_path / "log")
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(TraceError, match="exists: choose another name"):
        Log(source).write(tmp_path / "out", ImportOptions(num_experts=6))
    assert (tmp_path / "out").read_bytes() == b"mine"
