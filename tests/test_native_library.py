"""The native library as a whole: its instruction sets, and what happens when it is damaged."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glmkern

CSRC = Path(__file__).parents[1] / "csrc"


def run_python(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """GLMKERN_CPU_ISA chooses it, or says what the chip lacks. The tests of ops run with each."""
    glmkern.backends("cpu")
    child = run_python(
        "-c",
        "import glmkern, torch; glmkern.backends('cpu'); print(torch.ops.glmkern_cpu.isa())",
        GLMKERN_CPU_ISA=isa,
    )
    if isa in torch.ops.glmkern_cpu.isas().split():
        assert child.stdout.strip() == isa, child.stderr
    else:
        assert f"GLMKERN_CPU_ISA is {isa}, but this chip runs at most" in child.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no x86 instructions")
def test_instructions_stay_in_their_instruction_set():
    """Also not in an inline function of a shared header: a linker keeps one of its copies, and
    that may be the one that was compiled for AVX-512."""
    avx = re.compile(r"\tv\w+ ")
    avx512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
    bf16 = re.compile(r"\tv\w*bf16")
    seen, guilty = set(), set()
    for function, instruction in disassembly(Path(glmkern.__file__).with_name("_native.so")):
        isa = re.search(r"glmkern::(DEFAULT|AVX2|AVX512|AVX512_BF16)::", function)
        isa = isa.group(1) if isa else "DEFAULT"
        seen.add(isa)
        if bf16.search(instruction) and isa != "AVX512_BF16":
            guilty.add(f"AVX512_BF16 in {function}")
        elif avx512.search(instruction) and not isa.startswith("AVX512"):
            guilty.add(f"AVX-512 in {function}")
        elif avx.search(instruction) and isa == "DEFAULT":
            guilty.add(f"AVX in {function}")
    assert seen == {"DEFAULT", "AVX2", "AVX512", "AVX512_BF16"}
    assert not guilty


def disassembly(library: Path):
    """(demangled name of the function, instruction) of everything in the library."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", library],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    function = ""
    for line in listing.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = head.group(1)
        elif "\t" in line:
            yield function, line + " "


def test_an_unknown_instruction_set_is_refused():
    child = run_python("-c", "import glmkern; glmkern.backends('cpu')", GLMKERN_CPU_ISA="sse9")
    assert child.returncode == 1
    assert (
        'GLMKERN_CPU_ISA is "sse9"; it can be default, avx2, avx512 or avx512_bf16' in child.stderr
    )


def test_the_instruction_set_can_be_switched():
    glmkern.backends("cpu")
    native = torch.ops.glmkern_cpu
    before, names = native.isa(), native.isas().split(" ")
    known = ["default", "avx2", "avx512", "avx512_bf16"]
    assert names == known[: len(names)] and before in names
    x, weight = torch.randn(5, 37), torch.randn(37)
    expected = torch.nn.functional.rms_norm(x, [37], weight, 1e-5)
    try:
        for name in names:
            native.set_isa(name)
            assert native.isa() == name
            torch.testing.assert_close(native.rms_norm_fwd(x, weight, 1e-5)[0], expected)
        with pytest.raises(RuntimeError, match='GLMKERN_CPU_ISA is "sse9"; it can be default'):
            native.set_isa("sse9")
        assert native.isa() == names[-1]
    finally:
        native.set_isa(before)


def test_an_instruction_set_that_the_chip_lacks_is_refused(tmp_path):
    """isa.cpp as an older chip would run it: there, every question for a feature is answered no."""
    main = tmp_path / "main.cpp"
    main.write_text("""
        #define __builtin_cpu_supports(feature) 0
        #include "cpu/isa.cpp"
        #include <cstdio>
        int main(int count, char** arguments) {
          try {
            if (count > 1) glmkern::set_cpu_isa(arguments[1]);
            std::puts(glmkern::isa_name(glmkern::cpu_isa()));
          } catch (const std::runtime_error& error) {
            std::puts(error.what());
          }
        }""")
    program = tmp_path / "isa"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", f"-I{CSRC}"]
    subprocess.run([*compiler, main, "-o", program], check=True)

    def ask(*arguments, **environment):
        return subprocess.run(
            [program, *arguments], check=True, capture_output=True, text=True, env=environment
        ).stdout.strip()

    assert ask() == ask("default") == "default"
    assert ask("avx512") == "GLMKERN_CPU_ISA is avx512, but this chip runs at most default"
    assert (
        ask(GLMKERN_CPU_ISA="avx2") == "GLMKERN_CPU_ISA is avx2, but this chip runs at most default"
    )


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_library_leaves_the_reference(tmp_path, damage):
    package = tmp_path / "glmkern"
    source = Path(glmkern.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    library = (source / "_native.so").read_bytes()
    damaged = {"cut": library[: len(library) // 2], "garbage": b"not a library", "empty": b""}
    (package / "_native.so").write_bytes(damaged[damage])
    code = """if True:
        import glmkern, torch
        assert glmkern.ops.rms_norm(torch.ones(2, 4), torch.ones(4)).shape == (2, 4)
        rows = glmkern.backends("cpu").rows
        print(rows["rms_norm_fwd", "reference"], "|", rows["rms_norm_fwd", "cpu"])"""
    child = run_python("-c", code, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("chosen | _native.so could not be loaded: "), child.stdout
