"""Whatever bytes stand where weights, an index or a configuration should: an answer or one sentence
that names the file; no other exception, no crash, no hang, no blow-up of memory."""

import io
import json
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from glmkern.checkpoint.base import read_base
from glmkern.checkpoint.tensor_files import read_tensors, weight_files
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig
from tests.model.models import SMALL

# torch's reader of pickles warns of unknown protocols before it refuses them.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
MOST_MEMORY = 300 * 2**20
fuzz = settings(max_examples=300, deadline=5000, suppress_health_check=list(HealthCheck))

NAMES = st.sampled_from(
    ["a", "transformer.output_layer.weight", "__metadata__", "", "é\0/..", "\n\x1b[31m"]
)
NUMBERS = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**53, 2**63, 2**64 - 1, -(2**63)])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module", autouse=True)
def _memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_MEMORY


def answered(path: Path, read) -> object:
    """What `read` returns, or None where it refuses in a sentence that names the file."""
    try:
        return read()
    except InputError as error:
        assert path.name in str(error)
        assert str(error).isprintable()
        return None


def check_tensors(path: Path) -> None:
    tensors = answered(path, lambda: read_tensors(path))
    for name, tensor in (tensors or {}).items():
        assert isinstance(name, str)
        assert tensor.numel() == 0 or tensor.nbytes <= path.stat().st_size
        tensor.flatten()[:1].clone()  # the memory it claims is there


ENTRIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(
                st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "BOOL", "X", ""]), JSON
            ),
            "shape": st.one_of(st.lists(NUMBERS, max_size=4), JSON),
            "data_offsets": st.one_of(st.lists(NUMBERS, min_size=1, max_size=3), JSON),
        },
    ),
)


@fuzz
@given(
    header=st.one_of(st.dictionaries(NAMES, ENTRIES, max_size=3), JSON),
    length=st.one_of(st.none(), NUMBERS),
    data=st.binary(max_size=64),
)
def test_headers_of_safetensors(tmp_path_factory, header, length, data):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    text = json.dumps(header).encode()
    claimed = len(text) if length is None else length % 2**64
    path.write_bytes(struct.pack("<Q", claimed) + text + data)
    check_tensors(path)


@fuzz
@given(
    place=st.integers(0, 400),
    new=st.binary(min_size=0, max_size=9),
    cut=st.integers(0, 9),
    end=st.one_of(st.none(), st.integers(0, 500)),
)
def test_damaged_safetensors(tmp_path_factory, place, new, cut, end):
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    content = save({"a": torch.ones(3, 4), "b.weight": torch.ones(7, dtype=torch.float16)})
    path.write_bytes((content[:place] + new + content[place + cut :])[:end])
    check_tensors(path)


def _saved() -> dict[str, bytes]:
    """The members of a .bin file."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(3, 4), "b.weight": torch.ones(7, dtype=torch.float16)}, file)
    archive = zipfile.ZipFile(file)
    return {name: archive.read(name) for name in archive.namelist()}


MEMBERS = _saved()
PICKLE = next(name for name in MEMBERS if name.endswith("data.pkl"))


@fuzz
@given(
    place=st.integers(0, len(MEMBERS[PICKLE])),
    new=st.binary(min_size=0, max_size=9),
    cut=st.integers(0, 9),
    missing=st.one_of(st.none(), st.sampled_from(sorted(MEMBERS))),
)
def test_damaged_pickles(tmp_path_factory, place, new, cut, missing):
    path = tmp_path_factory.getbasetemp() / "pytorch_model.bin"
    pickled = MEMBERS[PICKLE]
    members = MEMBERS | {PICKLE: pickled[:place] + new + pickled[place + cut :]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            if name != missing:
                archive.writestr(name, content)
    check_tensors(path)


@fuzz
@given(
    place=st.integers(0, 1500),
    new=st.binary(min_size=0, max_size=9),
    cut=st.integers(0, 9),
    end=st.one_of(st.none(), st.integers(0, 2000)),
)
def test_damaged_archives(tmp_path_factory, place, new, cut, end):
    path = tmp_path_factory.getbasetemp() / "pytorch_model.bin"
    file = io.BytesIO()
    torch.save({"a": torch.ones(3, 4)}, file)
    content = file.getvalue()
    path.write_bytes((content[:place] + new + content[place + cut :])[:end])
    check_tensors(path)


@fuzz
@given(
    index=st.one_of(
        JSON,
        st.fixed_dictionaries(
            {
                "weight_map": st.one_of(
                    JSON,
                    st.dictionaries(
                        NAMES,
                        st.one_of(
                            JSON,
                            st.sampled_from(["here.bin", "../x.bin", "/etc/passwd", "..", "\0"]),
                        ),
                        max_size=3,
                    ),
                )
            }
        ),
    ),
    raw=st.one_of(st.none(), st.binary(max_size=40)),
)
def test_indices(tmp_path_factory, index, raw):
    folder = tmp_path_factory.getbasetemp() / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "here.bin").touch()
    path = folder / "pytorch_model.bin.index.json"
    path.write_bytes(json.dumps(index).encode() if raw is None else raw)
    files = answered(path, lambda: weight_files(folder))
    assert all(file == folder / "here.bin" for file in files or ())


@fuzz
@given(
    change=st.dictionaries(
        st.sampled_from(
            [*SMALL, "quantization_bit", "pre_seq_len", "rope_ratio", "model_type", "eos_token_id"]
        ),
        st.one_of(JSON, NUMBERS),
        min_size=1,
        max_size=2,
    )
)
def test_configurations(tmp_path_factory, change):
    """A configuration that is accepted also says which weights it wants."""
    folder = tmp_path_factory.getbasetemp() / "configured"
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "chatglm", **SMALL, **change}))
    config = answered(path, lambda: ChatGLMConfig.from_pretrained(folder))
    if config is not None and config.num_layers < 100:
        (folder / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
        assert (
            answered(folder / "model.safetensors", lambda: list(read_base(folder, config))) is None
        )
