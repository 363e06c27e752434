"""The one dropout contract: Philox4x32-10 (Salmon et al., 2011), the same mask on every backend.

A mask belongs to a sequence, not to its place in a batch. Element i of sequence s is kept iff
lane i % 4 of philox(key, counter) is at least round(p * 2^32), where key = seed[0] and counter =
(i // 4, s, low(seed[1]), high(seed[1])). The backward pass draws the same numbers again, so that
nothing is stored.
"""

import torch
from torch import Tensor

from glmkern.ops.checks import check, check_device

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def keep_mask(seed: Tensor, sequence_ids: Tensor, count: int, p: float) -> Tensor:
    """Which elements 0 .. count-1 of each sequence survive dropout with probability p.

    Args:
        seed: int64 [2], (seed, offset).
        sequence_ids: int64 [B].
        count: elements a sequence.
        p: probability of dropping, 0 <= p < 1.

    Returns:
        bool [B, count].
    """
    groups = torch.arange((count + 3) // 4, device=seed.device)
    lanes = philox4x32(seed, groups, sequence_ids.unsqueeze(1))  # [B, groups, 4]
    return lanes.flatten(1)[:, :count] >= round(p * 2**32)


def philox4x32(seed: Tensor, counter: Tensor, sequence_ids: Tensor) -> Tensor:
    """Ten rounds of Philox4x32. `counter` and `sequence_ids` (int64) broadcast against each other.

    Returns:
        int64 [their shape, 4]: four lanes of 32 random bits.
    """
    key_a, key_b = seed[0] & _LOW, (seed[0] >> 32) & _LOW
    a, b = torch.broadcast_tensors(counter & _LOW, sequence_ids & _LOW)
    c = (seed[1] & _LOW).expand_as(a)
    d = ((seed[1] >> 32) & _LOW).expand_as(a)
    for _ in range(10):
        high_a, low_a = _multiply(_ROUND_A, a)
        high_c, low_c = _multiply(_ROUND_B, c)
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_A) & _LOW, (key_b + _KEY_B) & _LOW
    return torch.stack([a, b, c, d], -1)


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * x, from 16-bit halves: int64 can't hold the product."""
    low_product = factor * (x & 0xFFFF)
    high_product = factor * (x >> 16) + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def check_dropout(op: str, x: Tensor, p: float, seed: Tensor | None) -> None:
    """p is a probability below 1 and, where anything is dropped, seed is an int64 [2] tensor on
    x's device."""
    check(0 <= p < 1, lambda: f"{op}: the dropout probability must be in [0, 1), not {p}")
    if p == 0:
        return
    if seed is None or seed.shape != (2,) or seed.dtype != torch.int64:
        raise ValueError(
            f"{op}: dropout needs seed, an int64 tensor [2] = (seed, offset), not "
            f"{'None' if seed is None else f'{seed.dtype} {list(seed.shape)}'}"
        )
    check_device(op, "seed", seed, "the input", x)
