"""gpu.md and gpu.json: what the programs of `make gpu` leave is read, and failures are named."""

from bench.gpu import counters, stages
from bench.gpu.jobs import Outcome
from bench.gpu.report import as_markdown, is_good, predictions
from bench.gpu.run import Report


def test_half_a_line_and_half_a_file(tmp_path):
    """What a killed job leaves."""
    context = stages.Context(tmp_path, tmp_path, "cpu")
    context.rows.write_text('{"part": "step", "what": "a"}\n{"part": "st')
    (tmp_path / "rope.json").write_text('{"cuda": {"machine"')
    (tmp_path / "swiglu.json").write_text('{"cuda": {"rows": [], "machine": {}, "rounds": 1}}')
    report = Report(context)
    report.done(Outcome("try", "failed with -9"))
    assert report.found["rows"] == [{"part": "step", "what": "a"}]
    assert list(report.found["benches"]) == ["swiglu"]
    assert not is_good(report.found)


def test_the_model_has_verdicts_too():
    rows = [
        dict(part="right", what="step", verdict="right", ratio=0.5),
        dict(part="decode", what="decode", verdict="crashed", note="RuntimeError: no"),
        dict(part="decode", what="decoding 1 rows", ms_per_token=2.0),
    ]
    text = as_markdown(dict(machine={}, jobs=[], rows=rows, benches={}))
    assert "| model | right | step | right | 0.50 |" in text
    assert "| model | decode | decode | **crashed** |  | RuntimeError: no |" in text
    assert "| decode | decoding 1 rows | ms_per_token 2.0 |" in text
    assert text.count("decoding 1 rows") == 1


def test_jobs_without_rows_are_named_where_they_fail():
    """A build, tests and memory checks end with 1 and with any words."""
    failed = [
        dict(job=name, outcome="failed with 1", seconds=1.0, last_line=line)
        for name, line in (
            ("build _native_cuda", "ninja: build stopped: subcommand failed."),
            ("tests", "3 failed, 80 passed in 60.00s"),
            ("memcheck", "========= ERROR SUMMARY: 2 errors"),
            ("judge rope triton", "rope, triton, float16: step"),
            ("model step", "OSError: no space"),
        )
    ]
    text = as_markdown(dict(machine={}, jobs=failed, rows=[], benches={}))
    named = text.partition("## Jobs")[0]
    for job in ("build _native_cuda", "tests", "memcheck", "model step"):
        assert f"| {job} |  |  | **failed with 1** |" in named
    assert "judge rope" not in named


def test_slower_than_a_peer_is_a_verdict():
    row = dict(
        name="fwd",
        implementation="triton fused, chosen",
        shape="1 x 2",
        dtype="float16",
        median_ms=0.5,
        fastest_ms=0.4,
        gb_per_s=10.0,
        fraction=0.9,
        vs_peer=0.8,
    )
    run = {"machine": {"gpu": "a chip"}, "rounds": 3, "rows": [row, row | {"vs_peer": 1.2}]}
    report = {"machine": {}, "jobs": [], "rows": [], "benches": {"quant_linear": run}}
    text = as_markdown(report)
    assert text.count("slower") == 1
    assert "| quant_linear | triton fused, chosen | fwd, 1 x 2, float16 | slower |" in text


def test_predictions_stand_beside_what_was_measured():
    predicted = predictions("NVIDIA H100 80GB HBM3")
    key = ("swiglu", "forward", "2080 x 27392")
    assert predicted[key] > 0
    assert predictions("NVIDIA H200")[key] < predicted[key]
    assert predictions("NVIDIA GeForce RTX 4090")[key] > predicted[key]
    assert predictions("NVIDIA RTX 4000") == predictions("") == {}
    row = dict(zip(("op", "pass", "shape"), key, strict=True))
    row |= dict(backend="triton", dtype="float16", ms=0.1, gb_per_s=3.0, tflops=0)
    rows = [row, row | dict(dtype="float32")]
    report = dict(machine={"gpu": "NVIDIA H200"}, jobs=[], rows=rows, benches={})
    text = as_markdown(report)
    ms = predictions("NVIDIA H200")[key]
    assert f"| 2080 x 27392 | float16 | 0.1000 | {ms:g} | 3 | - |" in text
    assert "| 2080 x 27392 | float32 | 0.1000 | - | 3 | - |" in text
    assert "| predicted | token, CUDA graph, 1 rows |" in text


NCU = """==PROF== Connected to process 1
swiglu, triton: 2068 tokens
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","swiglu_fwd_kernel","GPU Speed Of Light Throughput","Duration","us","41.2"
"0","1","swiglu_fwd_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","88.1"
"0","1","swiglu_fwd_kernel","Warp State Statistics","Stall Long Scoreboard","inst","9.5"
"0","1","swiglu_fwd_kernel","Warp State Statistics","Stall Barrier","inst","0.1"
"0","1","swiglu_fwd_kernel","Warp State Statistics","Stall Wait","inst","1,200"
"0","1","swiglu_fwd_kernel","Warp State Statistics","Stall MIO","inst","2"
"1","1","swiglu_bwd_kernel","GPU Speed Of Light Throughput","Duration","us","61.9"
==WARNING== Found outstanding GPU clock reset
"""


def test_counters_are_read_from_the_report_of_ncu():
    first, second = counters.kernels("swiglu", NCU)
    assert first["kernel"] == "swiglu_fwd_kernel"
    assert first["counters"] == {
        "Duration": "41.2 us",
        "DRAM Throughput": "88.1 %",
        "Stall Wait": 1200.0,
        "Stall Long Scoreboard": 9.5,
        "Stall MIO": 2.0,
    }
    assert second["counters"] == {"Duration": "61.9 us"}
    assert list(counters.kernels("swiglu", "==ERROR== no permission")) == []
