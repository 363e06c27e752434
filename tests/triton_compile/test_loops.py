"""The loops of compiled Triton kernels: tensor cores where products are, wide loads where memory is
the limit."""

import re

import pytest

from bench.sass import Loop, kernel_of

# Launches whose half-precision products are in loops.
ATTENTION = {
    "prefix_attention_fwd, bfloat16",
    "prefix_attention_bwd_dq, bfloat16",
    "prefix_attention_bwd_dkv, bfloat16",
    "prefix_attention_bwd_dprefix, bfloat16",
}
PRODUCTS = ATTENTION | {
    f"{kernel}, 4 bits, {tokens} tokens, bfloat16"
    for tokens in (192, 512)
    for kernel in ("fused_fwd", "fused_bwd (dx)")
}
# Memory-bound launches on rows that are aligned to 16 bytes. Not among them: gemv_fwd, which reads
# x's even and odd columns apart, and rows of 4,099 columns, where no two begin alike.
STREAMS = {
    "prefix_attention_bwd_delta, bfloat16",
    "prefix_attention_bwd_sum, bfloat16",
    "prefix_attention_decode, bfloat16",
    "rms_norm_fwd, 4096 bfloat16",
    "swiglu_bwd, 13696 bfloat16",
    "qkv_rope_fwd, 32 + 2 x 2 heads bfloat16",
    "bias_dropout_add_fwd p=0, 4096 bfloat16",
}


@pytest.fixture(scope="module")
def compiled(measured_by) -> list[dict]:
    labels = [f"^{re.escape(label)}$" for label in sorted(PRODUCTS | STREAMS)]
    return measured_by("bench.triton_loops", "--sm", "80", "90", "--launch", "|".join(labels))


def with_products(compiled: list[dict]) -> list[tuple[str, int, dict]]:
    rows = [row for row in compiled if row["launch"] in PRODUCTS]
    assert len(rows) == 2 * len(PRODUCTS)
    return [
        (row["launch"], row["sm"], max(row["loops"], key=lambda loop: loop["fmas"])) for row in rows
    ]


def test_products_use_tensor_cores(compiled):
    for launch, sm, loop in with_products(compiled):
        opcodes = {name.split(".")[0] for name in loop["products"]}
        assert opcodes == {"HGMMA" if sm == 90 else "HMMA"}, (launch, sm)


def test_products_run_side_by_side(compiled):
    """Where ptxas gives up overlapping them, each waits for the one before."""
    for launch, sm, loop in with_products(compiled):
        if sm == 90 and launch in ATTENTION:
            assert loop["drains"] * 4 < loop["kinds"]["tensor"], launch


def test_streams_are_read_in_wide_words(compiled):
    """Most of what a lane reads: single numbers, as a row's, may come in narrower ones."""
    rows = [row for row in compiled if row["launch"] in STREAMS]
    assert len(rows) == 2 * len(STREAMS)
    for row in rows:
        bits = {int(width): int(width) * count for width, count in row["whole"]["loads"].items()}
        assert 2 * bits.get(128, 0) >= sum(bits.values()), (row["launch"], row["sm"], bits)


def test_no_local_memory(compiled):
    assert not [row["launch"] for row in compiled if row["whole"]["kinds"].get("local")]


def test_a_loop_is_counted():
    """A loop of one product, one wide copy and a part that a branch skips, inside another."""
    lines = [
        "MOV R0, RZ",
        "FADD R0, R0, R1",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "LDGSTS.E.BYPASS.LTC128B.128 [R119], desc[UR14][R140.64], !P0",
        "@P1 BRA 0x0060",
        "MUFU.EX2 R1, R2",
        "@!P0 BRA 0x0020    &req={3}",
        "@P2 BRA 0x0010",
        "EXIT",
    ]
    sass = "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */" for i, line in enumerate(lines)
    )
    whole, (outer, inner) = kernel_of(sass, 8)
    assert whole.instructions == 9
    assert outer == Loop(0x10, 0x70, 8, {"fma": 1, "branch": 1})
    assert (inner.instructions, inner.skipped, inner.loads) == (4, 1, {128: 1})
    # 64 x 128 x 16 multiply-adds of two warpgroups at 2,048 a cycle
    assert inner.cycles(90)["tensor"] == 2 * 64
    assert inner.cycles(90)["issue"] == 8
    # both factors, and what is copied, 512 bytes a warp
    assert inner.cycles(90)["shared"] == (2 * 16 * (64 + 128) * 2 + 8 * 512) / 128
