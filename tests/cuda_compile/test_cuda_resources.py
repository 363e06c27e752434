"""The CUDA C++ kernels compiled by nvcc for chips from the oldest to the newest, without a GPU."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import cuda_loops, cuda_resources
from bench.cuda_binaries import (
    CHIPS,
    CSRC,
    Instance,
    commands_of_files,
    compiled,
    instances_of,
    short_name,
)
from bench.cuda_loops import GPUS, hottest, share_of
from bench.cuda_resources import SMS, usage_of
from bench.sass import kernel_of

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
COMPILED = (75, 90)  # here; the committed table has all
COMMITTED = json.loads((cuda_resources.RESULTS / "cuda_resources.json").read_text())
LIMITS = {chip.sm: chip for chip in CHIPS}
BYTES = {"float": 4, "half": 2, "bfloat16": 2}
STATIC = 48 * 1024  # bytes of shared memory that need no permission
# Kernels that have no kWidth: those that use 16 bytes all the same, and those that do not.
WIDE = {"cross_entropy_kernel", "scale_kernel"}
NARROW = {
    *("split_sums_kernel", "combine_splits_kernel"),
    *("attend_scalar_kernel", "query_gradient_scalar_kernel", "key_gradients_scalar_kernel"),
}


@pytest.fixture(scope="module")
def measured() -> dict:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    return cuda_resources.measure(COMPILED)


@pytest.fixture(params=["committed", "compiled"])
def table(request) -> dict:
    return COMMITTED if request.param == "committed" else request.getfixturevalue("measured")


def usages(table: dict) -> list[tuple[str, dict, dict]]:
    return [
        (f"{row['kernel']}<{', '.join(row['arguments'])}> on sm_{usage['sm']}", row, usage)
        for row in table["rows"]
        for usage in row["usage"]
    ]


def wide_accesses(kernel: str, parameters: Sequence[str], arguments: Sequence[str]) -> set[str]:
    """Those of 16 bytes that it has where its template says so, or a list above."""
    given, both = dict(zip(parameters, arguments, strict=True)), {"LDG.128", "STG.128"}
    if kernel == "mma_backward_kernel":  # a weight's words are the columns of eight lanes
        tokens = "LDGSTS.128" if given["Policy"] == "Sm80" else "LDG.128"
        return {tokens, "STG.128"} if given["kWide"] == "true" else set()
    if kernel == "mma_forward_kernel":
        tokens = {"LDGSTS.128"} if given["Policy"] == "Sm80" else set()
        return both | tokens if given["kWide"] == "true" else set()
    if kernel.startswith(("attend_mma", "gradients_mma")):
        tiles = {"LDGSTS.128"} if given["Policy"] == "Sm80" else set()
        return both | tiles if given["kWide"] == "true" else set()
    if kernel == "row_numbers_kernel":
        return {"LDG.128"}
    if kernel == "gemv_forward_kernel":
        return {"LDG.128"} if given["kNarrow"] == "false" else set()
    if kernel == "gemv_backward_kernel":  # likewise
        return set()
    if "kWidth" in given:
        codes = kernel == "dequantize_kernel"  # of 8 to 32 bits beside 16 bytes of numbers
        is_wide = int(given["kWidth"]) * BYTES[given["T"]] == 16
        return ({"STG.128"} if codes else both) if is_wide else set()
    assert kernel in WIDE | NARROW, f"does {kernel} access 16 bytes at a time? Say it above"
    return both if kernel in WIDE else set()


def test_nothing_spills(table):
    assert not [
        name
        for name, _, usage in usages(table)
        if usage["stack"] or any(count.startswith(("LDL", "STL")) for count in usage["counts"])
    ]


def test_blocks_fit(table):
    for name, row, usage in usages(table):
        chip = LIMITS[usage["sm"]]
        assert usage["shared"] <= min(STATIC, chip.block_kib * 1024), name
        assert usage["registers"] <= 255 and row["threads"] <= 1024, name
        assert usage["occupancy"] > 0, name


def test_two_blocks_a_multiprocessor(table):
    """One can compute while another waits for memory. Kernels with products may hide it alone, and
    gemvs of eight tokens compute more than they wait."""
    alone = [
        name
        for name, row, usage in usages(table)
        if usage["occupancy"] * LIMITS[usage["sm"]].warps * 32 < 2 * row["threads"] - 1
        and not any("MMA." in kind for kind in usage["counts"])
        and not (row["kernel"].startswith("gemv_") and row["arguments"][1] == "8")
    ]
    assert not alone


def test_memory_is_accessed_by_16_bytes(table):
    for name, row, usage in usages(table):
        wide = wide_accesses(row["kernel"], row["parameters"], row["arguments"])
        assert wide <= set(usage["counts"]), name


def test_tensor_cores_multiply(table):
    """Turing's by their own instruction; and no kernel is compiled for the other's chips."""
    products = {"Sm75": "HMMA.1688", "Sm80": "HMMA.16816"}
    found = set()
    for name, row, usage in usages(table):
        if "Policy" in row["parameters"]:
            policy = row["arguments"][0]
            assert (policy == "Sm75") == (usage["sm"] < 80), name
            assert [c for c in usage["counts"] if "MMA" in c] == [products[policy]], name
            found.add((policy, row["kernel"]))
    assert len(found) == 8


def test_rms_norm_stores_its_partial_sums_by_16_bytes(table):
    kinds = {
        kind
        for _, row, usage in usages(table)
        if row["kernel"] == "rms_norm_backward_kernel"
        and wide_accesses(row["kernel"], row["parameters"], row["arguments"])
        for kind in usage["counts"]
        if kind.startswith("STG")
    }
    assert kinds == {"STG.128"}


def test_the_committed_table_is_current(measured):
    again = "run `python -m bench.cuda_resources`, and commit its files"
    for row in COMMITTED["rows"]:
        policy = dict(zip(row["parameters"], row["arguments"], strict=True)).get("Policy")
        chips = [sm for sm in SMS if policy is None or (policy == "Sm75") == (sm < 80)]
        assert [usage["sm"] for usage in row["usage"]] == chips, again
    for key in ("file", "kernel", "parameters", "arguments", "threads"):
        now, then = ([row[key] for row in table["rows"]] for table in (measured, COMMITTED))
        assert now == then, again
    if measured["nvcc"] == COMMITTED["nvcc"]:
        for row, committed in zip(measured["rows"], COMMITTED["rows"], strict=True):
            then = [usage for usage in committed["usage"] if usage["sm"] in COMPILED]
            assert row["usage"] == then, f"{row['kernel']} {row['arguments']}: {again}"


def test_memory_bounds_what_streams(measured):
    """`measured` has compiled for both of these GPUs' chips."""
    for instance, gpu, kernel in cuda_loops.compiled("", ["T4", "H100"]):
        wide = wide_accesses(instance.kernel, instance.parameters, instance.arguments)
        share = share_of(hottest(kernel), GPUS[gpu])
        if share is not None and wide == {"LDG.128", "STG.128"}:
            assert max(share.issue, share.busiest) < 1, (gpu, instance.name, share)


def test_committed_markdown_shows_the_table():
    path = cuda_resources.RESULTS / "cuda_resources.md"
    assert path.read_text() == cuda_resources.as_markdown(COMMITTED)


# -- planted kernels ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> dict[str, Instance]:
    """By kernel, for sm_80."""
    command = next(iter(commands_of_files().values()))
    cubin = compiled(command, Path(__file__).with_name("planted.cu"), LIMITS[80])
    return {instance.kernel: instance for instance in instances_of(cubin, "planted", LIMITS[80])}


@needs_nvcc
def test_local_memory_is_seen(planted):
    spilling = planted["spilling_kernel"]
    assert (spilling.arguments, spilling.threads) == (("float", "16"), 256)
    usage = usage_of(spilling)
    assert usage["stack"] == 64
    assert any(kind.startswith("LDL") for kind in usage["counts"])


@needs_nvcc
def test_products_are_counted(planted):
    instance = planted["product_kernel"]
    assert instance.shared == 4 * 32 * 16
    assert usage_of(instance)["counts"] == {
        "HMMA.1688": 1,
        "HMMA.16816": 1,
        "LDGSTS.128": 1,
        "LDSM.x2": 1,
        "LDSM.x4": 1,
        "STG.128": 1,
    }
    loop = hottest(kernel_of(instance.sass, instance.warps, guards=True))
    # 16 x 8 x (16 + 8) multiply-adds of 4 warps, 1,024 a cycle; 128 bytes of shared memory a cycle
    assert loop.cycles(80)["tensor"] == 4 * 16 * 8 * 24 / 1024
    assert loop.cycles(80)["shared"] == 4 * (32 * 16 + 6 * 128) / 128
    assert loop.loads == {128: 1} and share_of(loop, GPUS["A100 80GB"]) is None


def test_shares_of_a_loop():
    """16 bytes a lane for three instructions, behind a guard, and a division's rare case."""
    lines = [
        "MOV R0, RZ",
        "@P0 BRA 0x0040",
        "LDG.E.128 R4, [R2.64]",
        "CALL.REL.NOINC 0x0060",
        "@P1 BRA 0x0010",
        "EXIT",
        "F2F.F32.F16 R1, R2",
        "@P1 BRA 0x0010",
        "RET.REL.NODEC R2 0x0",
    ]
    sass = "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */" for i, line in enumerate(lines)
    )
    kernel = kernel_of(sass, 8, guards=True)
    (loop,) = kernel.loops
    assert (loop.begin, loop.end, loop.instructions, loop.global_bytes) == (0x10, 0x40, 4, 512)
    assert kernel.whole.instructions == 6
    share = share_of(loop, GPUS["T4"])
    # one instruction a cycle in each quarter; 320 GB/s for 40 multiprocessors at 1.59 GHz
    assert share.issue == pytest.approx(4 / 4 / (512 / (320 / (40 * 1.59))))


@pytest.mark.parametrize(
    ("declaration", "name"),
    [
        ("void a::(anonymous namespace)::f<__half, 8>(a::B, long)", ("f", ("half", "8"))),
        ("void f<a::V<__nv_bfloat16, 2>, true>(int)", ("f", ("a::V<bfloat16, 2>", "true"))),
        ("void f<(a::E)1, 2>(void (*)(int))", ("f", ("(a::E)1", "2"))),
        ("a::f(int)", ("f", ())),
    ],
)
def test_short_names(declaration, name):
    assert short_name(declaration) == name


@needs_nvcc
def test_every_kernel_is_compiled():
    """CMakeLists.txt has a list of its own."""
    assert set(commands_of_files()) == set(CSRC.glob("cuda/kernels/**/*.cu"))
