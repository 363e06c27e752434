"""The CUDA C++ kernels compiled for each chip, and each kernel's part of what `cuobjdump` prints.

Needs no GPU. CMake says which files belong to the library and with which flags; nvcc compiles each
for one chip. A binary lies in build/cuda_resources under a digest of all that it is made of, so
that only what has changed is compiled again.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.triton_resources import CHIPS as TRITON_CHIPS
from bench.triton_resources import CUOBJDUMP, Chip

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build/cuda_resources"
CHIPS = (Chip(75, 32, 64, reserved_kib=0), *TRITON_CHIPS)
JOBS = 2
# From this chip on the static shared memory that cuobjdump prints includes the reserved part.
RESERVED_IS_PRINTED = 90

TEMPLATE = re.compile(
    r"template <([^>]*)>\s*(?:static )?__global__ void\s*"
    r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\))?\s*(\w+)\("
)
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instance:
    """One instance of a kernel's template, compiled for one chip."""

    file: str  # rms_norm, of csrc/cuda/kernels/rms_norm.cu
    kernel: str
    parameters: tuple[str, ...]  # of the template: ("T", "kWidth")
    arguments: tuple[str, ...]  # ("half", "8")
    chip: Chip
    threads: int  # of a block, at most
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers, and arrays that are in no registers
    shared: int  # bytes a block, without what the launch decides
    sass: str

    @property
    def name(self) -> str:
        return f"{self.kernel}<{', '.join(self.arguments)}>" if self.arguments else self.kernel

    @property
    def warps(self) -> int:
        return self.threads // 32

    @property
    def given(self) -> dict[str, str]:
        """The arguments by their parameters."""
        return dict(zip(self.parameters, self.arguments, strict=True))


def instances(sms: Sequence[int], pattern: str = "") -> list[Instance]:
    """Of all kernels, for each of these chips; only of files whose name `pattern` is found in."""
    commands = {
        path: command
        for path, command in commands_of_files().items()
        if re.search(pattern, file_of(path))
    }
    chips = [chip for chip in CHIPS if chip.sm in sms]
    tasks = [(path, chip) for path in commands for chip in chips]

    def compile_one(task: tuple[Path, Chip]) -> list[Instance]:
        path, chip = task
        return list(instances_of(compiled(commands[path], path, chip), file_of(path), chip))

    with ThreadPoolExecutor(JOBS) as pool:
        found = [instance for many in pool.map(compile_one, tasks) for instance in many]
    return sorted(found, key=lambda i: (i.file, i.kernel, _order(i.arguments), i.chip.sm))


def _order(arguments: Sequence[str]) -> list[tuple[int, str]]:
    return [(int(a), "") if a.isdigit() else (0, a) for a in arguments]


# -- compiling ------------------------------------------------------------------------------------


@functools.cache
def nvcc_version() -> str:
    """13.0.88, say."""
    (version,) = re.findall(r"\bV([\d.]+)", _output("nvcc", "--version"))
    return version


def commands_of_files() -> dict[Path, list[str]]:
    """nvcc's command line by file, without chip, input and output.
    The sources and flags are those of CMakeLists.txt, which is configured for that."""
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    cmake, nvcc = shutil.which("cmake", path=path), shutil.which("nvcc")
    if not cmake or not nvcc:
        raise RuntimeError("compiling the CUDA kernels needs cmake and nvcc in PATH")
    options = {
        "TORCH_DIR": Path(torch.__file__).parent,
        "GLMKERN_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
    }
    folder = FOLDER / "cmake"
    where = ["-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    subprocess.run(
        [cmake, *where, *(f"-D{name}={value}" for name, value in options.items())],
        env=os.environ | {"PATH": path, "GLMKERN_CUDA_ARCHS": "75-virtual"},
        check=True,
        capture_output=True,
    )
    entries = json.loads((folder / "compile_commands.json").read_text(encoding="utf-8"))
    return {
        Path(entry["file"]): _without_chip(shlex.split(entry["command"]))
        for entry in entries
        if entry["file"].endswith(".cu")
    }


def _without_chip(command: list[str]) -> list[str]:
    """The command up to `-x cu -c FILE -o OBJECT`, which ends it."""
    flags = command[: command.index("-x")]
    return [flag for flag in flags if not flag.startswith("--generate-code")]


def file_of(path: Path) -> str:
    """How tables call a file: quant_linear/tensor_cores, say."""
    return path.relative_to(CSRC / "cuda/kernels").with_suffix("").as_posix()


def compiled(command: Sequence[str], source: Path, chip: Chip) -> Path:
    """The binary of one file for one chip, from the build folder where it is there."""
    code = f"--generate-code=arch=compute_{chip.sm},code=[sm_{chip.sm}]"
    cubin = FOLDER / f"{source.stem}-sm_{chip.sm}-{_digest([*command, code], source)}.cubin"
    if not cubin.exists():
        being_made = cubin.with_suffix(f".{os.getpid()}")
        _output(*command, code, "-cubin", "-o", str(being_made), str(source))
        being_made.replace(cubin)
    return cubin


def _digest(command: Sequence[str], source: Path) -> str:
    result = hashlib.sha256("\n".join([nvcc_version(), *command]).encode())
    for path in [source, *sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])]:
        result.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return result.hexdigest()[:16]


# -- reading --------------------------------------------------------------------------------------


def dump(cubin: Path, option: str) -> str:
    """What cuobjdump prints; kept beside the binary."""
    kept = cubin.with_suffix(f".{option}.txt")
    if not kept.exists():
        being_made = kept.with_suffix(f".{os.getpid()}")
        being_made.write_text(_output(str(CUOBJDUMP), f"-{option}", str(cubin)), encoding="utf-8")
        being_made.replace(kept)
    return kept.read_text(encoding="utf-8")


def instances_of(cubin: Path, file: str, chip: Chip) -> Iterator[Instance]:
    code, threads = sass_by_symbol(dump(cubin, "sass")), threads_by_symbol(dump(cubin, "elf"))
    resources = RESOURCES.findall(dump(cubin, "res-usage"))
    names = demangled([symbol for symbol, *_ in resources])
    for (symbol, *numbers), (kernel, arguments) in zip(resources, names, strict=True):
        if is_for_other_chips(code[symbol]):
            continue
        registers, stack, shared, local = map(int, numbers)
        if chip.sm >= RESERVED_IS_PRINTED:
            shared = max(shared - chip.reserved_kib * 1024, 0)
        yield Instance(
            file,
            kernel,
            template_parameters().get(kernel, ()),
            arguments,
            chip,
            threads[symbol],
            registers,
            stack + local,
            shared,
            code[symbol],
        )


def is_for_other_chips(sass: str) -> bool:
    """Whether there is a trap in the place of a kernel that this chip can't run."""
    return "BPT.TRAP" in sass and "LDG" not in sass


def sass_by_symbol(printed: str) -> dict[str, str]:
    _, *parts = re.split(r"^\s*Function : (\S+)$", printed, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def threads_by_symbol(printed: str) -> dict[str, int]:
    """Of a block, at most: __launch_bounds__, or what every chip can have."""
    _, *parts = re.split(r"^\.nv\.info\.(\S+)$", printed, flags=re.MULTILINE)
    found = {}
    for symbol, text in zip(parts[::2], parts[1::2], strict=True):
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:((?:\s+0x\w+){3})", text)
        x, y, z = (int(n, 16) for n in bounds[1].split()) if bounds else (1024, 1, 1)
        found[symbol] = x * y * z
    return found


def demangled(symbols: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Of each, the kernel's name and its template's arguments."""
    printed = _output("c++filt", *symbols) if symbols else ""
    return [short_name(line) for line in printed.splitlines()]


def short_name(declaration: str) -> tuple[str, tuple[str, ...]]:
    """("f", ("half", "8")) of "void a::(anonymous namespace)::f<__half, 8>(int)"."""
    text = declaration.replace("(anonymous namespace)::", "").removeprefix("void ")
    text = text.replace("__half", "half").replace("__nv_bfloat16", "bfloat16")
    text = re.sub(r"(\w+::)+(?=Sm\d)", "", text)
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "<(") - (letter in ">)")
        if letter == "(" and depth == 1:
            break
        if (letter, depth) in {("<", 1), (",", 1), (">", 0)}:
            parts.append("")
        else:
            parts[-1] += letter
    name, *arguments = (part.strip() for part in parts)
    return name.split("::")[-1], tuple(a for a in arguments if a)


@functools.cache
def template_parameters() -> dict[str, tuple[str, ...]]:
    """Names by kernel, from its source: ("T", "kWidth")."""
    files = [*CSRC.rglob("cuda/**/*.cu"), *CSRC.rglob("cuda/**/*.cuh")]
    return {
        kernel: tuple(parameter.split()[-1] for parameter in parameters.split(","))
        for path in files
        for parameters, kernel in TEMPLATE.findall(path.read_text(encoding="utf-8"))
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
