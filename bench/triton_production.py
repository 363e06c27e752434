"""Does everything compile that `make gpu` and a real run will launch? Registers, spills, memory.

    python -m bench.triton_production [--gpu "RTX 4090"] [--dtype float32 ...] [--json F]

Every launch of the cases of make gpu, of steps of 1 to 32 rows and of tokens of 1 to 16 rows of
ChatGLM2-6B, as it would be made on that GPU, compiled for it without one. Before a GPU is taken,
run this with the Triton that is there.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from bench.bench_full_size import chatglm2_6b
from bench.fake_gpu import DEVICE, Call, Event
from bench.gpu.cases import CHATGLM2_6B, OPS
from bench.launches import events_of_pack, events_of_token
from bench.model_gpu import NAMED, Gpu, events_of
from bench.train_models import ADVERTISEGEN_ROWS
from bench.triton_resources import usage_of

SETS = (1, 4, 8)  # of four rows in a pack
TOKENS = (1, 2, 5, 16)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def calls(gpu: Gpu, dtypes: Sequence[torch.dtype]) -> dict[tuple, Call]:
    """Those that Triton compiles to different kernels."""
    return {
        event.call.specialisation: event.call
        for event in _events(gpu, dtypes)
        if event.call is not None
    }


def _events(gpu: Gpu, dtypes: Sequence[torch.dtype]) -> Iterator[Event]:
    for dtype in dtypes:
        for make in OPS.values():
            for _, case_of in make(CHATGLM2_6B, dtype, DEVICE):
                for events in events_of(case_of(), gpu).values():
                    yield from events
    config, chip = chatglm2_6b(), gpu.as_chip()
    for rows in (ADVERTISEGEN_ROWS[:1], *(ADVERTISEGEN_ROWS * sets for sets in SETS)):
        yield from events_of_pack(config, rows, **chip)
    for rows in TOKENS:
        yield from events_of_token(config, rows, **chip)


def measure(gpu: Gpu, dtypes: Sequence[torch.dtype]) -> Iterator[dict]:
    """What each takes, or the error of the compiler."""
    for call in calls(gpu, dtypes).values():
        row = {"kernel": call.kernel.__name__, "limit": gpu.shared_kib * 1024}
        try:
            yield row | asdict(usage_of(call.to_compile(), gpu.chip))
        except Exception as error:
            yield row | {"error": f"{type(error).__name__}: {error}"[:300]}


def is_bad(row: dict) -> bool:
    return "error" in row or row["stack"] > 0 or row["shared"] > row["limit"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    with_triton = [name for name, gpu in NAMED.items() if gpu.has_triton]
    parser.add_argument("--gpu", choices=with_triton, default="H100")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float16"])
    parser.add_argument("--json", type=Path, help="write all rows there")
    args = parser.parse_args()
    rows = list(measure(NAMED[args.gpu], [DTYPES[name] for name in args.dtype]))
    if args.json is not None:
        args.json.write_text(json.dumps(rows))
    bad = [row for row in rows if is_bad(row)]
    for row in bad:
        print(row)
    print(f"{len(rows)} kernels for {args.gpu}, Triton {triton.__version__}: {len(bad)} bad")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
