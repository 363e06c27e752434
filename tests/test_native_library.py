"""The native library as a whole: its instruction sets, and what happens when it is damaged."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glmkern

TESTS_OF_OPS = Path(__file__).with_name("ops")
ISA_SOURCE = Path(__file__).parents[1] / "csrc/cpu/isa.cpp"


def run_python(*arguments, cwd=None, **environment):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False,
                          cwd=cwd, env={**os.environ, **environment})


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The tests of the C++ kernels again, in a process that must use `isa`."""
    glmkern.backends("cpu")
    if torch.ops.glmkern_cpu.isa() == isa:
        return  # what this process uses: the tests of the ops themselves cover it
    child = run_python("-m", "pytest", "-q", str(TESTS_OF_OPS), "-k", "cpu or bits",
                       GLMKERN_CPU_ISA=isa)
    refused = f"GLMKERN_CPU_ISA is {isa}, but this chip runs at most" in child.stdout
    assert child.returncode == 0 or refused, child.stdout
    chosen = run_python("-c", "import glmkern, torch; glmkern.backends('cpu');"
                              "print(torch.ops.glmkern_cpu.isa())", GLMKERN_CPU_ISA=isa)
    assert refused or chosen.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused():
    child = run_python("-c", "import glmkern; glmkern.backends('cpu')", GLMKERN_CPU_ISA="sse9")
    assert child.returncode == 1
    assert 'GLMKERN_CPU_ISA is "sse9"; it can be default, avx2 or avx512' in child.stderr


def test_an_instruction_set_that_the_chip_lacks_is_refused(tmp_path):
    """isa.cpp as an older chip would run it: there, every question for a feature is answered no."""
    main = tmp_path / "main.cpp"
    main.write_text(f"""
        #define __builtin_cpu_supports(feature) 0
        #include "{ISA_SOURCE}"
        #include <cstdio>
        int main() {{
          try {{
            std::puts(glmkern::isa_name(glmkern::cpu_isa()));
          }} catch (const std::runtime_error& error) {{
            std::puts(error.what());
          }}
        }}""")
    program = tmp_path / "isa"
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", main, "-o", program], check=True)

    def ask(**environment):
        return subprocess.run([program], check=True, capture_output=True, text=True,
                              env=environment).stdout.strip()

    assert ask() == "default"
    assert ask(GLMKERN_CPU_ISA="avx2") == "GLMKERN_CPU_ISA is avx2, but this chip runs at most " \
        "default"


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_library_leaves_the_reference(tmp_path, damage):
    package = tmp_path / "glmkern"
    source = Path(glmkern.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    library = (source / "_native.so").read_bytes()
    damaged = {"cut": library[:len(library) // 2], "garbage": b"not a library", "empty": b""}
    (package / "_native.so").write_bytes(damaged[damage])
    code = """if True:
        import glmkern, torch
        assert glmkern.ops.rms_norm(torch.ones(2, 4), torch.ones(4)).shape == (2, 4)
        rows = glmkern.backends("cpu").rows
        print(rows["rms_norm_fwd", "reference"], "|", rows["rms_norm_fwd", "cpu"])"""
    child = run_python("-c", code, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("chosen | _native.so could not be loaded: "), child.stdout
