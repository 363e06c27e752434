"""What only a kernel of prefix_attention can get wrong: bits, tiles, splits, launches, memory."""

import itertools
from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from glmkern.triton_kernels import prefix_attention as kernels
from glmkern.triton_kernels import tiles as tile_tables
from tests.ops.attention import (
    SEED,
    SMALL,
    TILES,
    attend,
    case_id,
    cumulative,
    decode,
    dense,
    dkv,
    launched_kernels,
    shared,
    tensors,
    tiles,
)
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "prefix_attention_fwd"
library = torch.ops.glmkern
LONG = [300, 1, 70]  # its gradients are summed in several pieces, some of two sequences
# Where float16 would show nothing new: only the types differ, and the interpreter is slow.
WIDE_AND_NARROW = (torch.float32, torch.bfloat16)


@pytest.fixture
def seed(backend):
    return torch.tensor(SEED)


@pytest.fixture
def small_tiles(backend):
    """Short inputs cross many boundaries of tiles."""
    with tiles(SMALL):
        yield


@pytest.fixture
def launched(backend, monkeypatch):
    """The names of the kernels that were launched."""
    return launched_kernels(monkeypatch)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_bits_do_not_depend_on_the_run_or_the_threads(backend, threads, seed, dtype, p):
    inputs = tensors(LONG, 8, 2, 20, 9, dtype)

    def run(number):
        threads(number)
        with poisoned_memory():
            out, lse = ops.prefix_attention(
                *inputs, cu_seqlens=cumulative(LONG), return_lse=True, prefix_dropout=p, seed=seed
            )
            return out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    first = run(1)
    for number in (1, 2, 3):
        assert all(map(same_bits, run(number), first))


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    "case",
    [  # heads that divide 16, that 16 divides, and neither; C over 128
        ([20, 1, 9], 8, 1, 16, 18),
        ([3, 6], 32, 1, 15, 7),
        ([29, 12], 6, 2, 5, 0),
        ([5], 2, 2, 140, 3),
    ],
    ids=case_id,
)
def test_small_tiles(backend, small_tiles, case):
    lengths = case[0]
    matches_fp64(
        attend(lengths), lambda *x: dense(*x, lengths), lambda: tensors(*case, torch.float32)
    )


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("kib", [64, 99, 163, 227])
def test_tiles_of_every_class(backend, kib, dtype, monkeypatch):
    """Those of a GPU that has less shared memory are its own."""
    if not backend.interpreted:
        kib = min(kib, tile_tables.shared_memory_kib(torch.device(backend.device)))
    monkeypatch.setattr(tile_tables, "shared_memory_kib", lambda device: kib)
    lengths = [18, 3]
    with tiles(None):
        matches_fp64(
            attend(lengths),
            lambda *x: dense(*x, lengths),
            lambda: tensors(lengths, 8, 1, 24, 70, dtype),
        )


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    "case", [([5, 1, 9], 4, 2, 17, 3), ([33, 2, 1, 30], 8, 1, 16, 7)], ids=case_id
)
def test_late_values(backend, case):
    """Each block's product with the values after the scores of the next block."""
    lengths = case[0]
    with tiles(SMALL._replace(late=True)):
        matches_fp64(
            attend(lengths), lambda *x: dense(*x, lengths), lambda: tensors(*case, torch.float32)
        )


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scale_not_above_zero_across_tiles(backend, small_tiles, scale, dtype):
    """The largest score is then not that of the largest product."""

    def scaled(q, *rest):
        return dense(q * (scale * q.shape[-1] ** 0.5), *rest, [20, 9])

    matches_fp64(
        attend([20, 9], scale=scale), scaled, lambda: tensors([20, 9], 4, 2, 16, 18, dtype)
    )


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 6), (3, 1, 3), (9, 2, 128)], ids=str)
def test_mask_bit_for_bit(backend, seed, shape, dtype):
    """Groups of four elements, groups that begin in the middle, and more than one program."""
    rate, ids = 0.3, torch.tensor([2**32 - 1, 0, 5])
    keys, values = torch.randn(2, *shape)
    with poisoned_memory():
        prefix = shared.prefix_of(torch.empty(0, dtype=dtype), keys, values, rate, seed, ids, True)
    keep = keep_mask(seed, ids, 2 * keys.numel(), rate).view(3, 2, -1)
    assert torch.equal(prefix.kept != 0, keep)
    rounded = torch.stack([keys, values]).to(dtype).float().flatten(1)
    expected = (rounded * (keep.float() / (1 - rate))).to(dtype)
    assert same_bits(torch.stack([prefix.keys, prefix.values], 1), expected)


def arguments(lengths, dtype, rate, seed, sizes=(4, 2, 6, 3)):
    """dout and the other arguments of a backward, up to what is asked for."""
    inputs = [x.detach() for x in tensors(lengths, *sizes, dtype)]
    batch = (cumulative(lengths), torch.arange(len(lengths)), seed, sizes[2] ** -0.5, rate)
    out, lse = library.prefix_attention_fwd(*inputs, *batch)
    return torch.randn_like(out), *inputs, out, lse, *batch


@pytest.mark.backends("triton")
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_only_what_is_asked_for_is_launched(backend, seed, launched, rate):
    call = arguments([5, 3], torch.float32, rate, seed)
    everything = library.prefix_attention_bwd(*call, True, True)
    drop = ["drop_prefix_kernel"] if rate else []
    add = ["prefix_attention_bwd_sum_kernel"] if rate else []  # two sequences, two sums
    delta, dq, dk, dprefix = (
        f"prefix_attention_bwd_{name}_kernel" for name in ("delta", "dq", "dkv", "dprefix")
    )
    assert launched == [*drop, "prefix_attention_fwd_kernel", *drop, delta, dq, dk, dprefix, *add]
    for token_grad, prefix_grad, names in (
        (False, True, [*drop, delta, dprefix, *add]),
        (True, False, [*drop, delta, dq, dk]),
        (False, False, []),
    ):
        launched.clear()
        part = library.prefix_attention_bwd(*call, token_grad, prefix_grad)
        assert launched == names
        for i, (a, b) in enumerate(zip(part, everything, strict=True)):
            wanted = token_grad if i < 3 else prefix_grad
            assert same_bits(a, b) if wanted else a.numel() == 0


@pytest.mark.backends("triton")
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("rows", [16, 48])
def test_splits(backend, small_tiles, seed, rows, rate, monkeypatch):
    """Sums in many pieces, some of no rows at all, are those in one."""
    call = arguments([17, 1, 6], torch.float32, rate, seed, (4, 1, 8, 20))
    monkeypatch.setattr(dkv, "ROWS_OF_A_SPLIT", 10**6)
    whole = library.prefix_attention_bwd(*call, True, True)
    monkeypatch.setattr(dkv, "ROWS_OF_A_SPLIT", rows)
    with poisoned_memory(), mock.patch.object(dkv, "launch", wraps=dkv.launch) as launch:
        split = library.prefix_attention_bwd(*call, True, True)
    assert sum("sum" in call.args[0].__name__ for call in launch.call_args_list) == 2
    assert same_bits(split[0], whole[0])
    for a, b in zip(split[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_splits_depend_on_shapes_alone():
    assert dkv.row_splits(programs=6, rows=192 * 16) == 12  # a short sequence: 256 rows each
    assert dkv.row_splits(programs=64, rows=2048 * 16) == 5  # 264 programs
    assert dkv.row_splits(programs=10**4, rows=10**6) == 1
    assert dkv.row_splits(programs=0, rows=1) == 1


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_same_bits_every_time(backend, seed, dtype, rate):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        call = arguments([20, 1, 6], dtype, rate, seed, (8, 1, 20, 9))
        with poisoned_memory():
            runs.append([*call[6:8], *library.prefix_attention_bwd(*call, True, True)])
    assert all(map(same_bits, *runs))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("sizes", [([1], 1, 1, 1, 1), ([5, 19], 6, 2, 5, 18)], ids=case_id)
def test_touches_nothing_outside(backend, small_tiles, seed, sizes, rate, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    buffers = []

    def surrounded(shape, dtype, fill):
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count + 8192,), fill, dtype=dtype))
        return buffers[-1][4096 : 4096 + count].view(shape)

    def new_empty(self, *shape, dtype=None, **options):
        if options:  # the interpreter's own
            return allocate(self, *shape, dtype=dtype, **options)
        shape = shape[0] if not isinstance(shape[0], int) else shape
        return surrounded(shape, dtype or self.dtype, 7)

    allocate = torch.Tensor.new_empty

    lengths, n, g, c, p = sizes
    q, k, v, *prefix = (
        surrounded(x.shape, x.dtype, torch.nan).copy_(x.detach())
        for x in tensors(*sizes, torch.float32)
    )
    caches = [surrounded((2, 40, g, c), q.dtype, torch.nan) for _ in range(2)]
    lens, new = torch.tensor([1, 37]), torch.tensor([1, 2])
    for cache in caches:
        cache[0, :1], cache[1, :37] = torch.randn(1, g, c), torch.randn(37, g, c)
    queries = surrounded((2, 3, n, c), q.dtype, torch.nan)
    queries[0, :1], queries[1, :2] = torch.randn(1, n, c), torch.randn(2, n, c)
    dout = surrounded(q.shape, q.dtype, torch.nan).copy_(torch.randn(q.shape))
    batch = (cumulative(lengths), torch.arange(len(lengths)), seed, 0.5, rate)
    inputs = len(buffers)

    monkeypatch.setattr(dkv, "ROWS_OF_A_SPLIT", 16)
    monkeypatch.setattr(decode, "KEYS_OF_A_SPLIT", 16)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    out, lse = kernels.prefix_attention_fwd(q, k, v, *prefix, *batch)
    gradients = kernels.prefix_attention_bwd(dout, q, k, v, *prefix, out, lse, *batch, True, True)
    decoded = kernels.prefix_attention_decode_fwd(queries, *caches, lens, *prefix, new, 0.5)
    assert all(x.isfinite().all() for x in (out, lse, *gradients, decoded))
    assert len(buffers) - inputs >= 12
    for buffer in buffers[inputs:]:
        assert (buffer[:4096] == 7).all()
        assert (buffer[-4096:] == 7).all()


@pytest.mark.parametrize("channels", [1, 16, 17, 128, 129, 512])
def test_tiles_fit_the_channels(channels):
    BC = shared.block_of_channels(channels)
    assert max(channels, 16) <= BC < max(2 * channels, 17)
    for file, kib, size in itertools.product(TILES, (64, 227), (2, 4)):
        tile = shared.fit_channels(TILES[file][kib][size], BC)
        assert tile.rows >= 16 and tile.keys >= 16
