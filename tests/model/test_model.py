"""What the model promises beyond its numbers: packing, dropout, frozen weights, errors."""

import types

import pytest
import torch

from bench.oracles import relative_error
from glmkern.model.computation import RECOMPUTE, Computation
from glmkern.model.packing import PackedBatch, pack_rows
from tests.model.models import SMALL, padded_batch, random_rows, small_model


def gradient(model, *losses):
    model.zero_grad()
    for loss in losses:
        loss().backward()
    return torch.cat([p.grad.flatten() for p in model.prefix_encoder.parameters()])


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_padded(side):
    model = small_model()
    batch = padded_batch([9, 1, 17, 4], SMALL["padded_vocab_size"], side)
    rows = [
        types.SimpleNamespace(input_ids=ids[mask].tolist(), labels=labels[mask].tolist())
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        )
    ]
    assert model.loss(pack_rows(rows)) == model(**batch).loss


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_packing_changes_neither_masks_nor_gradient(recompute):
    """In float64, where rounding cannot hide a mask that moved."""
    model = small_model(dict(hidden_dropout=0.2), dtype=torch.float64).train()
    model.prefix_encoder.double()
    model.computation = Computation(recompute=recompute)
    rows = random_rows([6, 3, 11, 8])
    labelled = [sum(x != -100 for x in row.labels[1:]) for row in rows]
    weights = [1 / (4 * n) for n in labelled]

    def loss(chosen):
        return lambda: model.loss(
            pack_rows([rows[i] for i in chosen], chosen, [weights[i] for i in chosen]),
            dropout_offset=12,
            seed=3,
        )

    together = gradient(model, loss([0, 1, 2, 3]))
    apart = gradient(model, loss([2]), loss([3, 0]), loss([1]))
    assert relative_error(apart, together) < 1e-12


def test_recompute_trades_memory_for_the_same_bits():
    model = small_model(dict(hidden_dropout=0.1)).train()
    batch = pack_rows(random_rows([6, 3, 11]))
    gradients, saved = [], []

    def size(tensor):
        saved[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for recompute in RECOMPUTE:
        model.computation = Computation(recompute=recompute)
        saved.append({})
        with torch.autograd.graph.saved_tensors_hooks(size, lambda tensor: tensor):
            gradients.append(gradient(model, lambda: model.loss(batch, 5, 1)))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    none, mlp, layer = (sum(sizes.values()) for sizes in saved)
    gate_up = 20 * 2 * SMALL["ffn_hidden_size"] * 4 * SMALL["num_layers"]
    assert mlp <= none - gate_up and layer < mlp / 2


def test_the_official_call_draws_new_masks_in_training():
    model = small_model().train()
    batch = padded_batch([9, 4], SMALL["padded_vocab_size"], "right")
    assert len({model(**batch).loss.item() for _ in range(4)}) == 4
    model.eval()
    assert len({model(**batch).loss.item() for _ in range(4)}) == 1


def test_autocast_changes_nothing():
    model = small_model()
    batch = pack_rows(random_rows([6, 3, 11]))
    expected = gradient(model, lambda: model.loss(batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(model, lambda: model.loss(batch)), expected)


def test_dropout_depends_on_step_seed_and_mode():
    model = small_model().train()
    batch = pack_rows(random_rows([6, 3]))
    losses = {model.loss(batch, offset, seed).item() for offset, seed in ((0, 0), (3, 0), (0, 1))}
    assert len(losses) == 3
    assert model.loss(batch, 3, 0) == model.loss(batch, 3, 0)
    model.eval()
    assert model.loss(batch, 3, 0) == model.loss(batch, 0, 1)


def test_gradient_against_finite_differences():
    model = small_model(dict(hidden_dropout=0.3), dtype=torch.float64).train()
    model.prefix_encoder.double()
    batch = pack_rows(random_rows([5, 3]))
    exact = gradient(model, lambda: model.loss(batch, 7, 2)).view_as(
        model.prefix_encoder.embedding.weight
    )
    weight, step = model.prefix_encoder.embedding.weight, 1e-6
    for row, column in torch.randint(5, (12, 2)).tolist():
        column *= weight.shape[1] // 5
        with torch.no_grad():
            weight[row, column] += step
            up = model.loss(batch, 7, 2)
            weight[row, column] -= 2 * step
            down = model.loss(batch, 7, 2)
            weight[row, column] += step
        assert (up - down).item() / (2 * step) == pytest.approx(
            exact[row, column].item(), rel=1e-5, abs=1e-9
        )


def test_only_the_prefix_trains():
    model = small_model(projection=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"transformer.prefix_encoder.{name}"
        for name in (
            "embedding.weight",
            "trans.0.weight",
            "trans.0.bias",
            "trans.2.weight",
            "trans.2.bias",
        )
    }
    model.loss(pack_rows(random_rows([4]))).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_parameter_count_of_the_6b_shape():
    model = small_model(
        dict(num_layers=28, kv_channels=128, multi_query_group_num=2), pre_seq_len=136
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_949_696


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            dict(input_ids=torch.tensor([0, 151])),
            "token ids run from 0 to 151, but this model has 0",
        ),
        (dict(input_ids=torch.tensor([-1, 3])), "token ids run from -1 to 3"),
        (dict(positions=torch.tensor([0, 64])), "positions run from 0 to 64, .* 0 to 63"),
        (
            dict(labels=torch.tensor([151, -100])),
            "labels run from 151 to 151, but this model has 0",
        ),
        (dict(labels=torch.tensor([-100, -100])), "no token carries a label"),
    ],
)
def test_values_out_of_range(change, sentence):
    batch = pack_rows([types.SimpleNamespace(input_ids=[1, 2], labels=[-100, 2])])
    with pytest.raises(ValueError, match=sentence):
        small_model().loss(PackedBatch(**{**vars(batch), **change}))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(input_ids=torch.zeros(3, dtype=torch.int64)), r"input_ids must be \[B, S\]"),
        (
            dict(attention_mask=torch.ones(1, 2)),
            r"attention_mask must have input_ids' shape \[2, 3\]",
        ),
        (dict(labels=torch.zeros(2, 2)), "labels must have input_ids' shape"),
        (
            dict(attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])),
            "row 1 of attention_mask is all",
        ),
    ],
)
def test_padded_call_out_of_shape(arguments, sentence):
    call = dict(input_ids=torch.zeros(2, 3, dtype=torch.int64)) | arguments
    with pytest.raises(ValueError, match=sentence):
        small_model()(**call)


@pytest.mark.parametrize("rows", [[], [types.SimpleNamespace(input_ids=[], labels=[])]])
def test_empty_rows_are_refused(rows):
    with pytest.raises(ValueError, match="at least one row and no empty rows"):
        pack_rows(rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(sequence_ids=[]), "sequence_ids must have one value a row, 1, not 0"),
        (dict(token_weight_per_row=[1.0, 2.0]), "token_weight_per_row must have one value a row"),
        (
            dict(rows=[types.SimpleNamespace(input_ids=[1, 2], labels=[1])]),
            r"\[2\] tokens and \[1\] labels",
        ),
    ],
)
def test_values_must_be_one_a_row_or_token(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        pack_rows(**{"rows": random_rows([3])} | arguments)


def test_unknown_recompute():
    with pytest.raises(ValueError, match="recompute must be one of none, mlp, layer, not 'all'"):
        Computation(recompute="all")


def test_interleaved_heads_need_a_prefix_of_their_size():
    with pytest.raises(ValueError, match="pre_seq_len is 5 with multi_query_attention False"):
        small_model(dict(multi_query_attention=False, multi_query_group_num=2))
