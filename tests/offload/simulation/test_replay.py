"""`offload replay` and `offload.replay`: rows, brackets, gaps, sweeps, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest

import offload
from cache.errors import BudgetError, OffloadError, PolicyError, TraceError
from cache.policy import find_policy, names
from cache.traces.trace import Trace
from offload.simulation.compare import replay
from offload.simulation.rows import Row, Setting
from offload.simulation.sweep import Task, grid, sweep
from offload.terminal.lists import split_list
from tests.cache.machines import MB, machine


def make_trace(seed: int = 0, metadata: dict[str, str] | None = None) -> Trace:
    """Skewed, sticky routing: 4 sequences of 40 tokens, 3 layers, top-2 of 8."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, 9)
    experts = np.zeros((160, 3, 2), np.uint8)
    for token in range(160):
        for layer in range(3):
            if token % 40 and rng.random() < 0.5:
                experts[token, layer] = experts[token - 1, layer]
            else:
                experts[token, layer] = rng.choice(8, 2, replace=False, p=popularity / popularity.sum())
    weights = np.tile(np.array([0.7, 0.3], np.float32), (160, 3, 1))
    return Trace.from_arrays(experts, weights, np.arange(0, 161, 40), num_experts=8, metadata=metadata)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("traces") / "made.safetensors"
    make_trace(metadata={"expert_bytes": str(10 * MB)}).write(file)
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of `offload replay` with `arguments`."""
    return command_line.run(capsys, "replay", *arguments, code=code)


def test_rows_say_everything(path: Path) -> None:
    rows = replay(path, ["lfru"], ["25%", "200MB"], machine=machine())
    assert [(row.policy, row.capacity) for row in rows] == [
        (policy, capacity) for policy in ("lru", "belady", "belady-bypass", "lfru") for capacity in ("25%", "200MB")
    ]
    quarter, bytes_ = rows[-2:]
    assert (quarter.capacity_slots, quarter.capacity_fraction, quarter.capacity_bytes) == (6, 0.25, 60 * MB)
    assert (bytes_.capacity_slots, bytes_.capacity_bytes) == (20, 200 * MB)
    assert quarter.accesses == 160 * 3 * 2 == quarter.hits + quarter.misses
    assert quarter.bytes_moved == quarter.misses * 10 * MB
    assert quarter.stall_s is not None and quarter.stall_s > 0
    assert quarter.tokens_per_s is not None and bytes_.tokens_per_s is not None
    assert bytes_.tokens_per_s > quarter.tokens_per_s > 0
    assert (quarter.causal, quarter.admission, quarter.profile, quarter.warm) == (True, "forced", None, False)
    assert not rows[2].causal and rows[4].admission == "bypass"


def test_gaps_are_shares_of_the_way_from_lru_to_belady(path: Path) -> None:
    rows = {row.policy: row for row in replay(path, "lfru", "50%")}
    lru, lfru, belady, bypass = (rows[name] for name in ("lru", "lfru", "belady", "belady-bypass"))
    assert lru.hits < lfru.hits < belady.hits < bypass.hits
    assert lfru.gap_closed == (lfru.hits - lru.hits) / (belady.hits - lru.hits)
    assert lfru.gap_closed_bypass == (lfru.hits - lru.hits) / (bypass.hits - lru.hits)
    assert (lru.gap_closed, belady.gap_closed, bypass.gap_closed_bypass) == (0, 1, 1)


@pytest.mark.parametrize("pool", ["layer", "global"])
@pytest.mark.parametrize("warm", [False, True])
def test_timed_rows_have_the_counted_hits(path: Path, pool: str, warm: bool) -> None:
    settings: dict[str, Any] = {"pool": pool, "warm": warm, "machine": machine()}
    counted = replay(path, ["lfru", "lfu"], ["25%", "50%"], **settings)
    timed = replay(path, ["lfru", "lfu"], ["25%", "50%"], timed=True, **settings)
    for a, b in zip(counted, timed, strict=True):
        assert (a.policy, a.hits, a.bypasses) == (b.policy, b.hits, b.bypasses)
        if a.admission == "forced":
            assert a.tokens_per_s == pytest.approx(b.tokens_per_s)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_predictors_stand_beside_fetching_on_demand(path: Path, device: str) -> None:
    settings: dict[str, Any] = {"timed": True, "machine": machine(), "device": device, "dense_layer_bytes": "500MB"}
    rows = replay(path, ["lfru"], ["50%"], predictor="oracle", prefetch_depth=1, **settings)
    assert [(row.policy, row.predictor, row.prefetch_depth) for row in rows] == [
        *((policy, "none", 0) for policy in ("lru", "belady", "belady-bypass", "lfru")),
        ("lfru", "oracle", 1),
    ]
    plain, ahead = rows[-2:]
    assert ahead.hits + ahead.late_hits + ahead.misses == plain.hits + plain.misses == 160 * 3 * 2
    assert ahead.useful_prefetches > 0 == ahead.wasted_prefetches and ahead.device == device
    assert ahead.tokens_per_s is not None and plain.tokens_per_s is not None and ahead.stall_s is not None
    assert ahead.tokens_per_s > plain.tokens_per_s and ahead.stall_s < (plain.stall_s or 0)
    assert ahead.gap_closed is None and plain.gap_closed is not None


def test_predictors_on_the_command_line(path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--policy", "lfru", "--machine", profile_file, "--predictor", "frequency,oracle"]
    out, _ = run(capsys, path, *flags, "--json")
    assert [row["predictor"] for row in json.loads(out)] == ["none"] * 4 + ["frequency", "oracle"]
    out, _ = run(capsys, path, *flags)
    assert "oracle, 2 ahead" in " ".join(out.split())
    _, err = run(capsys, path, *flags[:4], "--predictor", "cross-layer-gate")
    assert "has no record of what gates said ahead, which cross-layer-gate goes by" in " ".join(err.split())


def test_caches_too_small_for_policies_to_differ_are_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "capacity 25%, 6%: every event needs at least as many experts as a layer's cache has places"
    out, err = run(capsys, path, "--policy", "random", "--capacity", "25%,50%,6%", "--json")
    assert said in err and "--pool global or a larger --capacity" in err and err.count("so policies") == 1
    forced = [row for row in json.loads(out) if row["admission"] == "forced"]
    hits = {size: {row["hits"] for row in forced if row["capacity"] == size} for size in ("25%", "50%")}
    assert len(hits["25%"]) == 1 < len(hits["50%"])
    assert "so policies" not in run(capsys, path, "--capacity", "50%")[1]
    assert "so policies" not in run(capsys, path, "--capacity", "25%", "--pool", "global")[1]


def test_all_means_every_policy_that_needs_no_training(path: Path) -> None:
    left_out: list[str] = []
    rows = replay(path, "all", "25%", skipped=left_out.append)
    learning = [name for name in names() if find_policy(name).learns]
    assert {row.policy for row in rows} == set(names()) - set(learning)
    assert len(left_out) == len(learning) and all("--profile" in line for line in left_out)
    trained = replay(path, "all", "25%", profile=path)
    assert {row.policy for row in trained} == set(names())
    assert {row.policy for row in trained if row.profile} == {n for n in names() if find_policy(n).can_learn}


def test_the_package_offers_it(path: Path) -> None:
    assert offload.replay is replay


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"capacities": "101%"}, BudgetError, "between 0% and 100%"),
        ({"capacities": "x%"}, BudgetError, "between 0% and 100%"),
        ({"capacities": "lots"}, BudgetError, "--capacity"),
        ({"policies": "lruu"}, PolicyError, "no eviction policy"),
        ({"pool": "expert"}, PolicyError, "--pool"),
        ({"timed": True}, OffloadError, "give --machine"),
        ({"predictor": "oracle"}, OffloadError, "give --machine"),
        ({"device": "gpu"}, OffloadError, "give --machine"),
        ({"device": "tpu", "timed": True}, OffloadError, "--device"),
        ({"prefetch_depth": 0}, PolicyError, "--prefetch-depth"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    path: Path, arguments: dict[str, Any], error: type[OffloadError], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        replay(path, **arguments)


def test_bytes_need_an_experts_size() -> None:
    with pytest.raises(BudgetError, match="give --expert-bytes"):
        replay(make_trace(), "lru", "1G")
    (row, *_) = replay(make_trace(), "lru", "60MB", expert_bytes="10MB")
    assert row.capacity_slots == 6


def test_a_profile_is_of_the_same_model(path: Path, tmp_path: Path) -> None:
    other = Trace.from_arrays(np.zeros((2, 1, 1)), np.ones((2, 1, 1)), [0, 2], num_experts=4)
    other.write(tmp_path / "other.safetensors")
    with pytest.raises(TraceError, match="name a profile of the same model"):
        replay(path, "static", profile=tmp_path / "other.safetensors")


# The command


def test_the_table(path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, path, "--policy", "lfru,lfu", "--capacity", "25%,50%", "--machine", profile_file)
    assert out.count("made.safetensors:") == 2
    for word in ("belady-bypass", "lfru", "gap closed", "knows the future", "tokens/s"):
        assert word in out
    assert "no seconds" not in err


def test_json_is_a_list_of_rows(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, path, "--policy", "lfru", "--capacity", "25%", "--warm", "--json")
    rows = json.loads(out)
    wanted = (
        "trace policy params pool warm capacity_fraction capacity_bytes accesses hits hit_rate bytes_moved stall_s "
        "tokens_per_s causal admission profile"
    )
    assert len(rows) == 4 and all(set(wanted.split()) <= set(row) for row in rows)
    assert all(row["warm"] for row in rows)


def test_missing_columns_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trace().write(tmp_path / "plain.safetensors")
    _, err = run(capsys, tmp_path / "plain.safetensors")
    assert "give --expert-bytes" in err


@pytest.mark.parametrize(
    "arguments",
    [["--policy", "lru,,lfu"], ["--policy", "nope"], ["--capacity", "-3%"], ["--machine", "nowhere.json"], ["--timed"]],
)
def test_mistakes_end_in_one_line(path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, path, *arguments, code=2)
    assert err.count("\n") == 1 and "offload: error:" in err


def test_a_damaged_trace_is_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    _, err = run(capsys, cut, code=2)
    assert "cut.safetensors" in err and err.count("\n") == 1


def test_a_policy_of_ones_own(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_for_replay.py").write_text(
        "from cache.policy import EvictionPolicy\n\n\n"
        "class Mine(EvictionPolicy):\n"
        "    def reset(self):\n        super().reset()\n        self.heat = self.zeros()\n\n"
        "    def touch(self, touch):\n        super().touch(touch)\n"
        "        self.heat[touch.lanes, touch.columns] *= 0.9\n"
        "        self.heat.reshape(-1)[touch.at] += touch.weights\n\n"
        "    def priorities(self, lanes):\n        return self.heat[lanes]\n"
    )
    monkeypatch.chdir(tmp_path)
    out, _ = run(capsys, path, "--policy", "mine_for_replay:Mine", "--json")
    assert json.loads(out)[-1]["policy"] == "Mine"


def test_the_plot(path: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.png"
    run(capsys, path, "--capacity", "25%,50%", "--machine", profile_file, "--plot", file)
    assert file.read_bytes()[:4] == b"\x89PNG"


# Sweeps


def test_a_grid_is_every_combination() -> None:
    assert grid("lru") == ["lru"]
    assert grid("m:P(a=[1, 2], b='x', c=[0.5])") == ["m:P(a=1, b='x', c=0.5)", "m:P(a=2, b='x', c=0.5)"]
    with pytest.raises(PolicyError, match="cannot read the grid"):
        grid("lru(a=)")


def test_lists_keep_what_is_in_brackets() -> None:
    assert split_list("lru, lfu(a=[1,2], b=3),x:Y") == ["lru", "lfu(a=[1,2], b=3)", "x:Y"]


def swept(tasks: list[Task], store: Path) -> list[Row]:
    """The rows of `tasks`, in this process, in their order."""
    return [row for _, rows in sorted(sweep(tasks, 1, store)) for row in rows]


def test_a_sweep_goes_on_where_it_was(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task(str(path), policy, ("25%", "50%"), Setting()) for policy in ("lru", "lfu", "lfru")]
    store = tmp_path / "rows.jsonl"
    first = swept(tasks[:2], store)
    assert len(store.read_text().splitlines()) == 4
    with store.open("a") as file:
        file.write('{"key": "cut sho')  # the program was killed here
    ran: list[str] = []
    real = Task.run
    monkeypatch.setattr(Task, "run", lambda task: ran.append(task.policy) or real(task))
    rows = swept(tasks, store)
    assert ran == ["lfru"]
    assert rows[:4] == first
    assert swept(tasks, store) == rows and ran == ["lfru"]
    assert swept([Task(str(path), "lru", ("25%",), Setting(warm=True))], store) != rows[:1] and len(ran) == 2


def test_a_sweep_in_processes_gives_the_same(
    path: Path, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [path, "--policy", "lfru,lfu", "--capacity", "25%", "--machine", profile_file, "--json"]
    plain, _ = run(capsys, *arguments)
    swept, _ = run(capsys, *arguments, "--sweep", tmp_path / "rows.jsonl", "--jobs", 2)
    assert json.loads(plain) == json.loads(swept)


def test_a_stock_machine_says_that_it_was_estimated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "estimated: rtx-4060-laptop: from specifications, not measured"
    arguments = [path, "--capacity", "25%", "--machine", "rtx-4060-laptop", "--device", "gpu"]
    out, _ = run(capsys, *arguments)
    assert out.count(said) == 1
    out, err = run(capsys, *arguments, "--json")
    assert "rtx-4060-laptop: from specifications, not measured" in err
    assert all(row["tokens_per_s"] > 0 for row in json.loads(out))
    assert replay(path, ["lru"], ["25%"], machine="mini-pc-ddr4")[0].tokens_per_s is not None
    _, err = run(capsys, path, "--machine", "rtx-4060", code=2)
    assert 'no machine is called "rtx-4060": choose one of a6000-workstation, ' in err
