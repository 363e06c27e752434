"""prefix_attention at ChatGLM2-6B's size: 32 heads of 128 channels in 2 groups, a prefix of 128; a
step of 1024 packed tokens, and one token after 1024."""

from collections.abc import Iterator

import torch

from bench.triton_cases import Launch, recorded

REASON = """Rows are the 16 heads of each token of a group, so that a block of keys is read once for
all of them. The forward and dq hold queries and their sums in registers, keys pass through shared
memory; dk and dv hold two sums, which eight warps share. Chips with 99 KiB have shorter blocks or
fewer stages. float32 runs without tensor cores and keeps both operands in registers, so its tiles
are small. Decoding has 16 rows and waits for memory."""
MEMORY_BOUND = False

HEADS, GROUPS, CHANNELS, PREFIX, TOKENS, SEQUENCES = 32, 2, 128, 128, 1024, 3
SCALE, RATE = CHANNELS**-0.5, 0.1
# Left out in float32: memory-bound kernels, and the sums, which are in float32 anyway.
SMALL = {
    "prefix_attention_bwd_delta_kernel",
    "prefix_attention_bwd_sum_kernel",
    "prefix_attention_decode_combine_kernel",
}
DROPPING = {"drop_prefix_kernel", "prefix_attention_bwd_dprefix_kernel"}


def launches() -> Iterator[Launch]:
    # by label: what both directions, or tokens and prefix, launch comes once
    yield from {launch.label: launch for launch in _launches(torch.bfloat16, 0.0)}.values()
    dropout = {launch.label: launch for launch in _launches(torch.bfloat16, RATE, " + dropout")}
    for launch in dropout.values():
        if launch.kernel.__name__ in DROPPING:
            yield launch
    for launch in _launches(torch.float32, 0.0):
        if launch.kernel.__name__ not in SMALL:
            yield launch


def _launches(dtype: torch.dtype, p: float, note: str = "") -> Iterator[Launch]:
    q, k = (torch.empty(TOKENS, n, CHANNELS, dtype=dtype, device="meta") for n in (HEADS, GROUPS))
    tokens, prefix = (q, k, k), (k[:PREFIX], k[:PREFIX])
    lse = torch.empty(TOKENS, HEADS, device="meta")
    seed, sequence_ids = (torch.empty(n, dtype=torch.int64, device="meta") for n in (2, SEQUENCES))
    cu_seqlens = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    batch = (cu_seqlens, sequence_ids, seed, SCALE, p)
    with recorded("prefix_attention", str(dtype).removeprefix("torch.")) as record:
        yield from record("prefix_attention_fwd", *tokens, *prefix, *batch, note=note)
        yield from record(
            "prefix_attention_bwd", q, *tokens, *prefix, q, lse, *batch, True, True, note=note
        )
        yield from record(
            "prefix_attention_decode_fwd",
            q[None, :1],
            k[None],
            k[None],
            sequence_ids[:1],
            *prefix,
            sequence_ids[:1],
            SCALE,
        )
