"""Predicted memory and time, against what models keep, steps took and torch counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.bench_full_size import PREFIX, PROMPT, RESPONSE, chatglm2_6b
from bench.oracles import diffusers_twin
from bench.train_models import OURS, WORKLOADS, make_model
from glmkern.checkpoint.base import MAPPED_BYTES
from glmkern.errors import InputError
from glmkern.model.computation import Computation
from glmkern.model.packing import pack_rows
from glmkern.plan import machines
from glmkern.plan import run as plan_run
from glmkern.plan.machines import GIB, GPUS, OPTIMISER, PROCESS, Machine, named_gpu, this_machine
from glmkern.plan.memory import base_bytes, prefix_parameters, saved_bytes
from glmkern.plan.precision import Precision
from glmkern.plan.prediction import (
    MARGIN,
    Job,
    Prediction,
    as_duration,
    fitted,
    predict,
    tokens_that_fit,
)
from glmkern.plan.run import forecast_run
from glmkern.plan.work import RowLength, attention_flops, linear_flops, linear_weights, step_flops
from glmkern.training.data.packs import pack_step
from glmkern.training.data.rows import Row
from glmkern.training.flags.arguments import (
    Arguments,
    DataTrainingArguments,
    ModelArguments,
    TrainingArguments,
)
from glmkern.training.setup import Setup
from tests.model.models import small_model

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "bench" / "results"


def machine(rate: float = 1e12, memory: float = 0, device: str = "cpu") -> Machine:
    """One that reaches `rate` on plain matrix products."""
    return Machine(
        "a machine",
        device,
        int(memory),
        PROCESS + OPTIMISER,
        rate * machines.CPU_SHARE_OF_PRODUCT,
        20e9,
        "nothing",
    )


SINGLE = Precision("float32", "float32")


def job(config, lengths, precision=SINGLE, **changes) -> Job:
    config = replace(config, pre_seq_len=config.pre_seq_len or 5)
    values = {
        "micro_batch": len(lengths),
        "accumulation": 1,
        "budget": 2048,
        "recompute": "none",
        "steps": 1,
        **changes,
    }
    return Job(config, precision, [RowLength(*each) for each in lengths], **values)


def random_rows(count: int, longest: int, vocabulary: int) -> list[Row]:
    made = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, ()))
        ids = torch.randint(vocabulary, (length,)).tolist()
        learned = int(torch.randint(1, length, ()))
        made.append(Row(ids, [-100] * (len(ids) - learned) + ids[-learned:]))
    return made


# Against measurements


def full_size() -> tuple[Prediction, float, float]:
    """A step of ChatGLM2-6B in 4 bits: predicted, and the seconds and MiB that were measured."""
    step = json.loads((RESULTS / "full_size.json").read_text())["stages"]["step"]
    config = replace(chatglm2_6b(), quantization_bit=4, pre_seq_len=PREFIX)
    predicted = predict(
        job(config, [(PROMPT + RESPONSE, RESPONSE)], Precision("float32", "float16")),
        machine(step["gemm_flops_per_s"]),
    )
    assert predicted.flops == step["flops"]
    return predicted, step["seconds"], 1024 * step["gib"]


def small_size(name: str) -> tuple[Prediction, float, float]:
    """The same of a workload of bench_train."""
    run = json.loads((RESULTS / "train.json").read_text())["cpu"]
    (row,) = [r for r in run["rows"] if (r["name"], r["implementation"]) == (name, OURS)]
    (peak,) = [m for m in run["memory"] if m["implementation"] == f"{name}: {OURS}"]
    config = replace(
        make_model().config, pre_seq_len=PREFIX, quantization_bit=4 if name == "int4" else 0
    )
    planned = job(
        config, [(sum(each), min(each[1], sum(each) - 1)) for each in WORKLOADS[name].lengths]
    )
    # The results have the share of the product rate that a step reached.
    seconds = row["median_ms"] / 1e3
    rate = predict(planned, machine()).flops / (seconds * row["fraction"])
    return predict(planned, machine(rate)), seconds, peak["peak_mib"]


@pytest.mark.parametrize("name", ["chatglm2-6b, 4 bits", *WORKLOADS])
def test_as_measured(name):
    """Memory within 15 %, time within 25 %, as docs/plan.md shows."""
    predicted, seconds, mib = small_size(name) if name in WORKLOADS else full_size()
    assert predicted.total / 2**20 == pytest.approx(mib, rel=0.15)
    assert predicted.seconds == pytest.approx(seconds, rel=0.25)
    row = (
        f"| {name} | {predicted.total / GIB:.2f} | {mib / 1024:.2f} | {predicted.seconds:.3g} | "
        f"{seconds:.3g} |"
    )
    assert row in (REPOSITORY / "docs" / "plan.md").read_text(), f"docs/plan.md lacks {row}"


# Memory, counted


@pytest.mark.parametrize("output_layer_bit", [0, 8])
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("rope", ["float32", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_base_bytes_are_those_of_a_model(dtype, rope, bits, output_layer_bit):
    changes = {"ffn_hidden_size": 38, "torch_dtype": "float16"}
    model = small_model(changes, pre_seq_len=None, dtype=dtype)
    if bits:
        model.quantize(bits)
    if output_layer_bit:
        model.transformer.output_layer.quantize_(output_layer_bit)
    precision = Precision.of(model.config, dtype, torch.device("cpu"), rope)
    model.cos_sin = model.cos_sin.to(getattr(torch, precision.rope))
    tensors = [*model.parameters(), *model.buffers()]
    stored = replace(
        precision,
        weights=str(dtype).removeprefix("torch."),
        scales=str(dtype).removeprefix("torch."),
    )  # not loaded from a folder
    total = sum(each.nbytes for each in tensors)
    assert base_bytes(model.config, stored, output_layer_bit) == total
    embedding = model.transformer.embedding.word_embeddings.weight.nbytes
    assert base_bytes(model.config, stored, output_layer_bit, True) == total - embedding


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_parameters(projection):
    model = small_model(projection=projection)
    assert prefix_parameters(model.config, 5) == sum(
        p.numel() for p in model.prefix_encoder.parameters()
    )


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_saved_bytes_are_what_autograd_keeps(recompute):
    model = small_model({"num_layers": 6}).train()
    model.computation = Computation(recompute=recompute)
    made = random_rows(4, 40, model.config.padded_vocab_size)
    weights = {p.data_ptr() for p in [*model.parameters(), model.cos_sin]}
    kept = {}

    def keep(x):
        if x.data_ptr() not in weights and x.numel() >= len(batch.input_ids):
            kept[x.data_ptr()] = x
        return x

    batch = pack_rows(made)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(batch)
    segments = {x.untyped_storage().data_ptr() for x in kept.values() if x.shape[0] == 5}
    measured = sum(
        x.nbytes for x in kept.values() if x.untyped_storage().data_ptr() not in segments
    )
    pack = RowLength(len(batch.input_ids), 1)
    assert saved_bytes(model.config, pack, "float32", recompute) == pytest.approx(
        measured, rel=0.03
    )
    assert loss.requires_grad


@pytest.mark.parametrize("budget", [0, 1, 37, 90, 2048])
def test_packs_are_the_trainers(budget):
    made = random_rows(24, 50, 100)
    order = [list(range(place, place + 3)) for place in range(0, 24, 3)]
    lengths = [(len(row.input_ids), sum(label != -100 for label in row.labels[1:])) for row in made]
    planned = job(chatglm2_6b(), lengths, micro_batch=3, accumulation=8, budget=budget)
    packs = [
        (pack.tokens, int((pack.batch.labels != -100).sum()))
        for pack in pack_step(made, order, budget)
    ]
    assert planned.packs(planned.rows) == packs


# Arithmetic, counted


def test_linear_flops_are_those_torch_counts():
    """Forward, in diffusers' model: the linears of all layers and the output layer."""
    model = small_model(pre_seq_len=None)
    twin, ids = diffusers_twin(model), torch.randint(100, (3, 17))
    with FlopCounterMode(display=False) as counter:
        hidden = twin(ids, use_cache=False, output_hidden_states=False, return_dict=False)[0]
        twin.output_layer(hidden)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "mm" in str(op))
    config, tokens = model.config, ids.numel()
    output = 2 * tokens * config.hidden_size * config.padded_vocab_size
    assert products == 2 * tokens * linear_weights(config) + output
    # Back it is the same again, but for the first layer's query_key_value.
    backward = linear_flops(config, tokens) - 2 * tokens * linear_weights(config)
    first = 2 * tokens * config.hidden_size * config.qkv_size
    assert backward == 2 * tokens * linear_weights(config) - first


def test_projection_flops_are_those_torch_counts():
    """The two trained matrices, forward and backward, once for every pack."""
    model = small_model(projection=True)
    with FlopCounterMode(display=False) as counter:
        sum(k.sum() + v.sum() for k, v in model.prefix_encoder()).backward()
    lengths, plain = [RowLength(9, 4)], replace(model.config, prefix_projection=False)
    added = step_flops(model.config, lengths, 5, packs=3) - step_flops(plain, lengths, 5, packs=3)
    assert added == 3 * counter.get_total_flops()


def test_attention_flops_count_what_is_seen():
    config, lengths = chatglm2_6b(), [RowLength(3, 1), RowLength(11, 4)]
    seen = sum(1 for n, _ in lengths for query in range(n) for key in range(-7, n) if key <= query)
    assert attention_flops(config, lengths, 7) == 2 * 2 * 32 * 128 * seen


def test_what_is_computed_again_costs_a_forward():
    config, lengths = chatglm2_6b(), [RowLength(100, 40)]
    none, mlp, layer = (step_flops(config, lengths, 128, each) for each in ("none", "mlp", "layer"))
    assert mlp - none == 28 * 2 * 100 * 4096 * 27392
    again = 28 * 2 * 100 * 4096 * (4608 + 4096 + 27392)
    assert layer - none == again + 28 * attention_flops(config, lengths, 128)


# The longest row

WITH_A_LONG_ROW = [(19, 7)] * 1500 + [(202, 90)] + [(19, 7)] * 1500


@pytest.mark.parametrize(
    "budget, micro_batch, largest",
    [
        (0, 1, (202, 90)),
        (0, 3, (240, 104)),
        (16, 1, (202, 90)),
        (64, 3, (202, 90)),
        (2048, 20, (380, 140)),
    ],
)
def test_a_long_row_is_planned_for_wherever_it_comes(budget, micro_batch, largest):
    planned = job(chatglm2_6b(), WITH_A_LONG_ROW, micro_batch=micro_batch, budget=budget)
    sampled = max(pack for step in planned.sampled_steps() for pack in planned.packs(step))
    assert sampled.tokens % 19 == 0  # the long row is not in the sample
    predicted = predict(planned, machine())
    assert predicted.largest_pack == RowLength(*largest)
    alone = predict(replace(planned, rows=[RowLength(*largest)]), machine())
    assert predicted.memory == alone.memory


def test_fewer_rows_than_a_micro_batch():
    planned = job(chatglm2_6b(), [(30, 4), (50, 9)], micro_batch=8, budget=0)
    assert predict(planned, machine()).largest_pack == (80, 13)


def test_the_default_leaves_room_for_the_longest_row():
    config = replace(chatglm2_6b(), quantization_bit=4)
    planned = job(config, WITH_A_LONG_ROW, micro_batch=1)
    short, long = (
        predict(replace(planned, rows=[RowLength(*row)]), machine(device="cuda")).total
        for row in ((19, 7), (202, 90))
    )
    for memory, budget in ((1.01 * long, 2048), ((short + long) / 2, 202)):
        assert fitted(planned, machine(memory=MARGIN * memory, device="cuda")).budget == budget


def test_a_run_too_long_for_a_date():
    planned = job(chatglm2_6b(), [(192, 0)], steps=10**18)
    assert "more than 100 years for 1,000,000,000,000,000,000 steps" in "\n".join(
        predict(planned, machine()).summary()
    )
    assert as_duration(1e300) == "more than 100 years"
    assert as_duration(90061.4) == "1 day, 1:01:01"


# Fitting


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_largest_pack_just_fits(recompute):
    config = replace(chatglm2_6b(), quantization_bit=4)
    planned = job(config, [(192, 0)], recompute=recompute, budget=0)
    small = machine(memory=7 * GIB)
    tokens = tokens_that_fit(planned, small)
    at, over = (replace(planned, rows=[RowLength(n, 0)]) for n in (tokens, tokens + 1))
    assert predict(at, small).fits and not predict(over, small).fits


@pytest.mark.parametrize("memory, budget", [(0, 2048), (30, 2048), (12, 1024), (8, 512), (4, 193)])
def test_the_default_packs_what_fits(memory, budget):
    """Halved until there is room, but never below a row."""
    config = replace(chatglm2_6b(), quantization_bit=4)
    planned = job(
        config, [(193, 129)] * 16, Precision("float32", "float16"), micro_batch=1, accumulation=16
    )
    here = machine(memory=memory * GIB)
    found = fitted(planned, here)
    assert found.budget == budget
    needs = MARGIN * predict(found, here).total
    assert not memory or needs <= here.memory or budget == 193
    if budget < 2048:
        larger = replace(found, budget=2 * budget)
        assert MARGIN * predict(larger, here).total > here.memory


def test_reading_may_take_more_than_training():
    """A wide base and one short row: pages of the files, and no optimiser yet."""
    planned = job(chatglm2_6b(), [(10, 3)], Precision("float32", "float16"))
    predicted = predict(planned, machine())
    base = base_bytes(planned.config, planned.precision)
    assert predicted.total == PROCESS + base + MAPPED_BYTES + 2 * 65024 * 4096
    assert predicted.total > sum(predicted.memory.values())
    assert "while the base is read" in "\n".join(predicted.table())
    on_gpu = predict(planned, machine(device="cuda"))
    assert on_gpu.total == sum(on_gpu.memory.values())


@pytest.mark.parametrize(
    "memory, words",
    [
        (30, None),
        (20, "--recompute mlp"),
        (14, "--recompute layer"),
        (12.8, "--recompute layer --tokens_per_pack 193"),
        (10, "--quantization_bit 4 --recompute mlp"),
        (4.9, "--quantization_bit 4 --recompute layer --tokens_per_pack 193"),
        (3, "lower --max_source_length"),
    ],
)
def test_the_cure_is_the_least_that_fits(memory, words):
    planned = job(
        chatglm2_6b(),
        [(193, 129)] * 16,
        Precision("float32", "float16"),
        micro_batch=1,
        accumulation=16,
    )
    predicted = predict(planned, machine(memory=memory * GIB))
    assert predicted.fits == (words is None)
    if words is not None:
        assert predicted.cure().removeprefix("pass ").startswith(words)
        assert ("--tokens_per_pack" in predicted.cure()) == ("--tokens_per_pack" in words)
        assert predicted.cure() in "\n".join(predicted.table())
        assert predicted.cure() in "\n".join(predicted.summary())


# Machines


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "rtx-4090"])
def test_a_gpu_has_many_spellings(name):
    assert named_gpu(name, "float16").name.startswith("RTX 4090 (data sheet: 24 GiB, 165.2 TFLOP")


@pytest.mark.parametrize(
    "name, dtype, rate",
    [
        ("A100 80GB", "float16", 312),
        ("A100 80GB", "bfloat16", 312),
        ("A100 80GB", "float32", 19.5),
        ("T4", "float16", 65),
        ("T4", "bfloat16", 8.1),
    ],
)
def test_the_rate_is_that_of_the_precision(name, dtype, rate):
    gpu = named_gpu(name, dtype)
    assert gpu.flops == pytest.approx(rate * 1e12 * machines.GPU_SHARE_OF_DATA_SHEET)
    assert ("sm_75: the Triton kernels need sm_80" in gpu.note) == (name == "T4")


def test_an_unknown_gpu():
    with pytest.raises(InputError) as error:
        named_gpu("RTX 4091", "float16")
    assert "(nearest: RTX 4090)" in str(error.value)
    assert all(name in str(error.value) for name in GPUS)


def test_this_machine_is_measured_without_random_numbers():
    this_machine.cache_clear()
    before = torch.get_rng_state()
    here = this_machine("cpu", "float32")
    assert torch.equal(before, torch.get_rng_state())
    assert 1e8 < here.flops < 1e15 and 1e8 < here.bandwidth < 1e13
    assert here.overhead > PROCESS and "measured" in here.name
    assert this_machine("cpu", "float32") is here


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(machines, "available_bytes", lambda: 12 * GIB)
    monkeypatch.setattr(machines, "resident_bytes", lambda: GIB)
    monkeypatch.setattr(machines, "_product_rate", lambda *_: 1e12)
    monkeypatch.setattr(machines, "_read_rate", lambda *_: 1e10)
    alone, shared = (this_machine.__wrapped__("cpu", "float32", *each) for each in ((), (3,)))
    assert (alone.memory, shared.memory) == (13 * GIB, 5 * GIB)
    assert "5.0 GiB free for each of 3 processes" in shared.name and "each" not in alone.name


@pytest.mark.parametrize(
    "device, environment, sharing",
    [
        ("cpu", {}, 1),
        ("cpu", {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, 3),
        ("cuda:1", {"LOCAL_WORLD_SIZE": "3"}, 1),
    ],
)
def test_a_run_knows_its_share(monkeypatch, device, environment, sharing):
    asked = []
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(plan_run, "this_machine", lambda *values: asked.append(values) or machine())
    arguments = Arguments(
        ModelArguments(model_name_or_path="base", pre_seq_len=5),
        DataTrainingArguments(),
        TrainingArguments(output_dir="out"),
        (),
    )
    setup = Setup(torch.device(device), torch.float32, Path("base"), chatglm2_6b(), arguments)
    forecast_run(setup, random_rows(3, 9, 100))
    assert asked == [(device, "float32", sharing)]
