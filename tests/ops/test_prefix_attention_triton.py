"""The Triton prefix_attention: against float64, and what only a kernel can get wrong. Its decode
form: test_prefix_attention_decode_triton.py."""

import itertools
from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from glmkern.triton_kernels import prefix_attention as kernels
from glmkern.triton_kernels import tiles
from glmkern.triton_kernels.prefix_attention import backward, decode, dkv, dprefix, forward, shared
from tests.ops.numerics import HALF_AND_SINGLE, SAMPLE, matches_fp64, poisoned_memory, same_bits
from tests.ops.test_prefix_attention import (
    case_id,
    check_packing,
    cumulative,
    dense,
    log_sum_exp,
    tensors,
)

FILES = (forward, backward, decode, dkv, dprefix, shared)
CASES = [  # lengths, N, G, C, P; no tensor so small that its largest error is luck
    ([1], 1, 1, 100, 1),
    ([1] * 10, 2, 1, 10, 10),
    ([5, 1, 9], 4, 2, 17, 3),
    ([3, 17], 4, 4, 8, 0),
    ([33, 2, 1, 30], 8, 1, 16, 7),
    ([19], 6, 3, 10, 40),
    ([7], 32, 2, 128, 40),
    ([60, 1, 8], 4, 1, 10, 10),  # the prefix's sums are divided, one over three sequences
]
TILES = {file: file.TILES for file in (forward, backward, decode, dkv)}
# Where float16 would show nothing new: only the types differ, and the interpreter is slow.
WIDE_AND_NARROW = (torch.float32, torch.bfloat16)
SMALL, MEDIUM = shared.AttentionTile(16, 16, 4, 1), shared.AttentionTile(32, 32, 4, 1)


@pytest.fixture(autouse=True)
def _device(device, monkeypatch):
    if device == "cpu":  # the interpreter's time goes by the number of blocks
        set_tiles(monkeypatch, MEDIUM)
    with torch.device(device):
        yield


def set_tiles(monkeypatch, tile):
    for file in TILES:
        monkeypatch.setattr(file, "TILES", {64: {2: tile, 4: tile}})


@pytest.fixture
def seed():
    return torch.tensor([-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1])


@pytest.fixture
def small_tiles(monkeypatch):
    """Short inputs cross many boundaries of tiles."""
    set_tiles(monkeypatch, SMALL)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names = []
    for file in FILES:

        def keep(kernel, *args, _launch=file.launch, **options):
            names.append(kernel.__name__)
            _launch(kernel, *args, **options)

        monkeypatch.setattr(file, "launch", keep)
    return names


def attend(lengths, **options):
    return lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative(lengths), **options)


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_fp64(case, dtype):
    lengths = case[0]
    sample = 500 if max(lengths) == 1 else SAMPLE  # PyTorch's error in few keys is luck
    matches_fp64(
        attend(lengths), lambda *x: dense(*x, lengths), lambda: tensors(*case, dtype), sample
    )


@pytest.mark.parametrize(
    "case",
    [  # heads that divide 16, that 16 divides, and neither; C over 128
        ([20, 1, 9], 8, 1, 16, 18),
        ([3, 6], 32, 1, 15, 7),
        ([9, 12], 6, 2, 5, 0),
        ([5], 2, 2, 140, 3),
    ],
    ids=case_id,
)
def test_small_tiles(small_tiles, case):
    lengths = case[0]
    matches_fp64(
        attend(lengths), lambda *x: dense(*x, lengths), lambda: tensors(*case, torch.float32)
    )


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("kib", [64, 99, 163, 227])
def test_tiles_of_every_class(kib, dtype, device, monkeypatch):
    """Those of a GPU that has less shared memory are its own."""
    own = tiles.shared_memory_kib(torch.device(device))
    kib = kib if device == "cpu" else min(kib, own)
    monkeypatch.setattr(tiles, "shared_memory_kib", lambda device: kib)
    for file, table in TILES.items():
        monkeypatch.setattr(file, "TILES", table)
    lengths = [18, 3]
    matches_fp64(
        attend(lengths),
        lambda *x: dense(*x, lengths),
        lambda: tensors(lengths, 8, 1, 24, 70, dtype),
    )


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=case_id)
def test_late_values(monkeypatch, case):
    """Each block's product with the values after the scores of the next block."""
    set_tiles(monkeypatch, SMALL._replace(late=True))
    lengths = case[0]
    matches_fp64(
        attend(lengths), lambda *x: dense(*x, lengths), lambda: tensors(*case, torch.float32)
    )


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scale_not_above_zero(small_tiles, scale, dtype):
    """The largest score is then not that of the largest product."""

    def scaled(q, *rest):
        return dense(q * (scale * q.shape[-1] ** 0.5), *rest, [20, 9])

    matches_fp64(
        attend([20, 9], scale=scale), scaled, lambda: tensors([20, 9], 4, 2, 16, 18, dtype)
    )


@pytest.mark.parametrize("size", [10, 1000])
def test_weights_of_almost_one_key(size):
    """Scores so far apart that most weights are 0."""

    def inputs():
        q, *rest = tensors([25, 7], 4, 2, 16, 9, torch.float32)
        return (q.detach() * size).requires_grad_(), *rest

    if size == 10:
        matches_fp64(attend([25, 7]), lambda *x: dense(*x, [25, 7]), inputs)
    leaves = inputs()
    out = attend([25, 7])(*leaves)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_without_prefix(dtype):
    lengths = [5, 1, 9]
    matches_fp64(
        attend(lengths),
        lambda *x: dense(*x, None, None, lengths),
        lambda: tensors(lengths, 4, 2, 10, 1, dtype)[:3],
    )


def test_many_sequences():
    """More than a program looks at together."""
    q, k, v, pk, pv = (x.detach() for x in tensors([1] * 129, 2, 1, 4, 5, torch.float32))
    out = attend([1] * 129)(q, k, v, pk, pv)
    torch.testing.assert_close(out, dense(q, k, v, pk, pv, [1] * 129))


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [([5, 1, 9], (6, 2, 10)), ([5, 1, 9], (7, 1, 15)), ([60, 1, 8], (9, 1, 13))],
    ids=["three", "rows of 15", "long"],
)
def test_dropout_against_fp64(seed, lengths, shape, dtype):
    (p, g, c), batch, rate = shape, len(lengths), 0.3
    ids = torch.arange(batch).flip(0) + 2**32 - 2
    keep = keep_mask(seed, ids, 2 * p * g * c, rate).view(batch, 2, p, g, c)
    matches_fp64(
        attend(lengths, prefix_dropout=rate, seed=seed, sequence_ids=ids),
        lambda *x: dense(*x, lengths, keep / (1 - rate)),
        lambda: tensors(lengths, 4 * g, g, c, p, dtype),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 6), (3, 1, 3), (9, 2, 128)], ids=str)
def test_mask_bit_for_bit(seed, shape, dtype):
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


def test_dropout_of_zeros(seed):
    """A zero that is kept has a gradient, a dropped one has none, whatever their signs."""
    lengths, rate = [5, 3], 0.4
    keep = keep_mask(seed, torch.arange(2), 2 * 6 * 17, rate).view(2, 2, 6, 1, 17)

    def inputs():
        *tokens, pk, pv = tensors(lengths, 4, 1, 17, 6, torch.float32)
        return *tokens, *((x.detach().sign() * 0.0).requires_grad_() for x in (pk, pv))

    matches_fp64(
        attend(lengths, prefix_dropout=rate, seed=seed),
        lambda *x: dense(*x, lengths, keep / (1 - rate)),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_float32_prefix_beside_half_tokens(seed, dtype, rate):
    lengths = [5, 1, 9]
    inputs = tensors(lengths, 4, 2, 6, 3, dtype, torch.float32)
    rounded = [x.detach().to(dtype).requires_grad_() for x in inputs]
    mixed, half = (
        torch.autograd.grad(attend(lengths, prefix_dropout=rate, seed=seed)(*x).sum(), x)
        for x in (inputs, rounded)
    )
    assert [g.dtype for g in mixed] == [dtype] * 3 + [torch.float32] * 2
    for a, b in zip(mixed, half, strict=True):
        assert same_bits(a.to(dtype), b)


@pytest.mark.parametrize("lengths", [[4, 1, 7], [40, 1, 33]], ids=str)
def test_packing_changes_nothing(seed, lengths):
    check_packing(lengths, seed)


def test_log_sum_exp_is_natural():
    q, k, v, pk, pv = tensors([9], 4, 2, 6, 5, torch.float32)
    _, lse = ops.prefix_attention(q, k, v, pk, pv, return_lse=True)
    torch.testing.assert_close(lse, log_sum_exp(q, k, pk))


def arguments(lengths, dtype, rate, seed, sizes=(4, 2, 6, 3)):
    """dout and the other arguments of a backward, up to what is asked for."""
    inputs = [x.detach() for x in tensors(lengths, *sizes, dtype)]
    batch = (cumulative(lengths), torch.arange(len(lengths)), seed, sizes[2] ** -0.5, rate)
    out, lse = torch.ops.glmkern.prefix_attention_fwd(*inputs, *batch)
    return torch.randn_like(out), *inputs, out, lse, *batch


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_only_what_is_asked_for_is_computed(seed, launched, rate):
    call = arguments([5, 3], torch.float32, rate, seed)
    everything = torch.ops.glmkern.prefix_attention_bwd(*call, True, True)
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
        part = torch.ops.glmkern.prefix_attention_bwd(*call, token_grad, prefix_grad)
        assert launched == names
        for i, (a, b) in enumerate(zip(part, everything, strict=True)):
            wanted = token_grad if i < 3 else prefix_grad
            assert same_bits(a, b) if wanted else a.numel() == 0


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("rows", [16, 48])
def test_splits(small_tiles, seed, rows, rate, monkeypatch):
    """Sums in many pieces, some of no rows at all, are those in one."""
    call = arguments([17, 1, 6], torch.float32, rate, seed, (4, 1, 8, 20))
    monkeypatch.setattr(dkv, "ROWS_OF_A_SPLIT", 10**6)
    whole = torch.ops.glmkern.prefix_attention_bwd(*call, True, True)
    monkeypatch.setattr(dkv, "ROWS_OF_A_SPLIT", rows)
    with poisoned_memory(), mock.patch.object(dkv, "launch", wraps=dkv.launch) as launch:
        split = torch.ops.glmkern.prefix_attention_bwd(*call, True, True)
    assert sum("sum" in call.args[0].__name__ for call in launch.call_args_list) == 2
    assert same_bits(split[0], whole[0])
    for a, b in zip(split[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_splits_depend_on_shapes_alone():
    assert dkv.row_splits(programs=6, rows=192 * 16) == 12  # a short sequence: 256 rows each
    assert dkv.row_splits(programs=64, rows=2048 * 16) == 5  # 264 programs
    assert dkv.row_splits(programs=10**4, rows=10**6) == 1
    assert dkv.row_splits(programs=0, rows=1) == 1


def test_slices_of_one_wider_row(seed):
    n, g, c, lengths = 4, 2, 6, [20, 9]
    qkv = torch.randn(29, n + 2 * g, c)
    slices = qkv[:, :n], qkv[:, n : n + g], qkv[:, n + g :]
    prefix = torch.randn(2, 3, g, c)
    batch = (cumulative(lengths), torch.arange(2), None, c**-0.5, 0.0)
    out, lse = torch.ops.glmkern.prefix_attention_fwd(*slices, *prefix, *batch)
    copies = [x.contiguous() for x in slices]
    expected = torch.ops.glmkern.prefix_attention_fwd(*copies, *prefix, *batch)
    assert all(map(same_bits, (out, lse), expected))
    dout = torch.randn(29, n + 1, c)[:, 1:]
    transposed = dout.transpose(1, 2).contiguous().transpose(1, 2)
    results, theirs, expected = (
        torch.ops.glmkern.prefix_attention_bwd(d, *x, *prefix, out, lse, *batch, True, True)
        for d, x in ((dout, slices), (transposed, slices), (dout.contiguous(), copies))
    )
    assert all(map(same_bits, results, expected))
    assert all(map(same_bits, theirs, expected))


@pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_same_bits_every_time(seed, dtype, rate):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        call = arguments([20, 1, 6], dtype, rate, seed, (8, 1, 20, 9))
        with poisoned_memory():
            runs.append([*call[6:8], *torch.ops.glmkern.prefix_attention_bwd(*call, True, True)])
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("sizes", [([1], 1, 1, 1, 1), ([5, 19], 6, 2, 5, 18)], ids=case_id)
def test_touches_nothing_outside(small_tiles, seed, sizes, rate, monkeypatch):
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


@pytest.mark.parametrize("call", ["fwd", "bwd"])
def test_sequences_must_fit(seed, call, monkeypatch):
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    dout, q, k, v, pk, pv, out, lse, _, *batch = arguments([5], torch.float32, 0.0, seed)
    with pytest.raises(ValueError, match="number of tokens, 5, not from 0 to 4"):
        if call == "fwd":
            torch.ops.glmkern.prefix_attention_fwd(q, k, v, pk, pv, cumulative([4]), *batch)
        else:
            torch.ops.glmkern.prefix_attention_bwd(
                dout, q, k, v, pk, pv, out, lse, cumulative([4]), *batch, True, True
            )


def test_forced_backend_refuses_float64():
    inputs = tensors([3], 2, 1, 4, 2, torch.float64)
    with pytest.raises(RuntimeError, match="'triton' is forced, but cannot serve"):
        ops.prefix_attention(*inputs)


@pytest.mark.parametrize("channels", [1, 16, 17, 128, 129, 512])
def test_tiles_fit_the_channels(channels):
    BC = shared.block_of_channels(channels)
    assert max(channels, 16) <= BC < max(2 * channels, 17)
    for file, kib, size in itertools.product(TILES, (64, 227), (2, 4)):
        tile = shared.fit_channels(TILES[file][kib][size], BC)
        assert tile.rows >= 16 and tile.keys >= 16
