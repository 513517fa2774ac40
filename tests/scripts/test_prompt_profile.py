"""Where a prompt's time goes: stacks counted to parts, and the script that samples them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.make_checkpoint import write_checkpoint
from scripts.bench.stacks import PARTS, profile
from tests.scripts.small import ROOT, linux, tiny

OFFLOAD, TRANSFORMERS = "/home/me/offload", "/venv/lib/python3.11/site-packages/transformers"
OUTPUTS, MODELING = f"{OFFLOAD}/engine/outputs.py", f"{TRANSFORMERS}/models/qwen3_moe/modeling_qwen3_moe.py"
EXPERT = f"compute_expert ({OUTPUTS}:38);_linear ({OUTPUTS}:63)"
ONEDNN = "0x7f (?);dnnl::impl::matmul_t<(dnnl::isa)71> (libtorch_cpu.so);dnnl::impl::parallel(int) (libtorch_cpu.so)"
GATE = f"compute_expert ({OUTPUTS}:40);_default_apply_gate ({TRANSFORMERS}/integrations/moe.py:579)"
MATRIX = f"StoredMatrix.linear ({OFFLOAD}/store/record.py:9);products ({OFFLOAD}/formats/cpu/nf4.py:60)"
NATIVE = f"{OFFLOAD}/formats/cpu/native"
NF4 = f"{EXPERT};{MATRIX};pool_run ({NATIVE}/pool.c)"
ATTENTION = f"Qwen3MoeAttention.forward ({MODELING}:161)"
WAIT = "Condition.wait (/usr/lib/python3.11/threading.py:327)"
STACKS = {
    f"{EXPERT};{ONEDNN}": "experts' products",
    f"{NF4};_mm512_add_ps (/usr/lib/gcc/include/avx512fintrin.h)": "experts' products",
    f"{NF4};unpack_tile ({NATIVE}/nf4.c)": "packing and unpacking",
    f"{GATE};at::(anonymous namespace)::silu (libtorch_cpu.so)": "experts' gates",
    f"Outputs._put ({OUTPUTS}:131)": "experts' rows, gathered and summed",
    f"Outputs.compute ({OUTPUTS}:90);Nf4Rows.compute ({OFFLOAD}/formats/cpu/nf4_experts.py:40)": "experts' products",
    f"{ATTENTION};sdpa_attention_forward ({TRANSFORMERS}/integrations/sdpa_attention.py:193)": "attention",
    f"{ATTENTION};RowLinear.forward ({OFFLOAD}/layers/rows.py:60)": "dense linear layers",
    f"{ATTENTION};Qwen3MoeRMSNorm.forward ({MODELING}:296)": "norms and rotary embeddings",
    f"Qwen3MoeTopKRouter.forward ({MODELING}:259)": "router",
    f"DiskEmbedding.forward ({OFFLOAD}/layers/embedding.py:80);preadv64v2 (libc.so.6)": "reading",
    f"TransferEngine.landed ({OFFLOAD}/engine/transfer.py:90);{WAIT}": "waiting for experts",
    f"Manager.plan ({OFFLOAD}/decide/manager.py:9)": "engine",
    f"Qwen3MoeDecoderLayer.forward ({MODELING}:346)": "others",
}


def main_thread(stack: str) -> str:
    outer = f"prefill (/home/me/scripts/bench/engines.py:192);OffloadedModel.forward ({OFFLOAD}/model.py:115)"
    return f"thread (12): MainThread;{outer};{stack} 3"


@pytest.mark.parametrize("stack", sorted(STACKS))
def test_a_stack_is_counted_to_its_part(stack: str) -> None:
    found = profile([main_thread(stack)], "prefill")
    assert dict(found.parts) == {STACKS[stack]: 3} and STACKS[stack] in PARTS


def test_functions_have_what_runs_below_them() -> None:
    found = profile(map(main_thread, STACKS), "prefill")
    assert found.samples == 3 * len(STACKS)
    assert found.functions["_linear (offload/engine/outputs.py:63) > dnnl::impl::matmul_t"] == 3
    assert found.functions["products (formats/cpu/nf4.py:60) > pool_run"] == 3
    assert found.functions["_default_apply_gate (transformers/integrations/moe.py:579) > at::silu"] == 3


def test_threads_that_read_are_beside_and_count_where_they_do_not_wait() -> None:
    read = f"_Reader.read ({OFFLOAD}/store/record.py:50);FileReader.read ({OFFLOAD}/store/files.py:50)"
    lines = [
        f"thread (13): offload-read-0;{read} 5",
        f"thread (13): offload-read-0;loop ({OFFLOAD}/engine/disk.py:50);{WAIT} 7",
        "thread (12): MainThread;serve (/home/me/scripts/bench/serve.py:26) 9",
    ]
    found = profile(lines, "prefill")
    assert found.samples == 0 and dict(found.beside) == {"reading": 5}


def run(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    write_checkpoint(tiny("qwen3-30b-a3b"), folder / "model", shard_bytes=200_000)
    command = [sys.executable, ROOT / "scripts/bench/prompt_profile.py", folder / "model", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_to_install_where_py_spy_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "--py-spy", "no-such-program")
    assert done.returncode == 2 and "there is no no-such-program: pip install py-spy" in done.stderr


@linux
@pytest.mark.skipif(shutil.which("py-spy") is None, reason="py-spy is not installed")
def test_the_profile_of_a_prompt(tmp_path: Path) -> None:
    done = run(tmp_path, "--prompt", 4000, "--repetitions", 1, "--threads", 1, "--top", 3)
    if "cannot attach" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parts"].keys() == set(PARTS) and sum(result["parts"].values()) == pytest.approx(1)
    assert result["tokens_per_s"] > 0 and 1 <= len(result["functions"]) <= 3 and result["samples"] > 0
