"""What `pip install` builds, leaves out and says; and what the native libraries contain."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import glmkern

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
NATIVE = Path(glmkern.__file__).with_name("_native.so")
# An environment that was not activated has its cmake and ninja all the same.
PATH = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])


@pytest.fixture
def source(tmp_path):
    """A copy of what an sdist holds."""
    folder = tmp_path / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("csrc", "glmkern"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def tools(tmp_path):
    """A folder for PATH with CMake and Ninja, and without a compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "ninja"):
        (folder / name).symlink_to(shutil.which(name, path=PATH))
    return folder


def build_wheel(source, **environment):
    """pip's output, and the wheel's path, or None where pip failed."""
    environment = {**os.environ, "GLMKERN_BUILD": "", "CXX": "", **environment}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(source / "wheels"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheels = list((source / "wheels").glob("*.whl"))
    assert len(wheels) == (done.returncode == 0), done.stdout + done.stderr
    return done.stdout + done.stderr, wheels[0] if wheels else None


def reasons(wheel):
    return json.loads(zipfile.ZipFile(wheel).read("glmkern/_build.json"))


def test_a_wheel_with_native_code(source):
    output, wheel = build_wheel(source, GLMKERN_BUILD="native")
    assert re.fullmatch(r"glmkern-.*-py3-none-(?!any).*\.whl", wheel.name)
    assert "glmkern: _native was built" in output
    assert not re.search(r"csrc/.*warning", output), output
    names = zipfile.ZipFile(wheel).namelist()
    assert {"glmkern/_native.so", "glmkern/cli.py", "glmkern/ops/rms_norm.py"} <= set(names)
    assert any(name.startswith("glmkern/demo/base/") for name in names)
    assert not [
        name for name in names if name.startswith(("csrc", "tests")) or "__pycache__" in name
    ]
    assert reasons(wheel)["_native"] is None


def test_without_a_compiler(source, tools):
    sentence = "no C++ compiler was found: install g++ or clang++, then glmkern again"
    output, wheel = build_wheel(source, PATH=str(tools))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert f"glmkern: _native skipped: {sentence}" in output
    assert reasons(wheel)["_native"] == sentence
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


def test_a_compiler_that_fails_is_told(source, tools):
    (tools / "c++").symlink_to(shutil.which("false"))
    _, wheel = build_wheel(source, PATH=str(tools))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "did not compile" in reasons(wheel)["_native"]


@pytest.mark.parametrize("insist", ["native", "cuda"])
def test_insisting_makes_it_an_error(source, tools, insist):
    output, wheel = build_wheel(source, PATH=str(tools), GLMKERN_BUILD=insist)
    assert wheel is None and "_native could not be built: no C++ compiler was found" in output


def test_building_nothing_and_a_misspelling(source):
    _, wheel = build_wheel(source, GLMKERN_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert set(reasons(wheel).values()) == {"GLMKERN_BUILD=none was set"}
    wheel.unlink()
    output, wheel = build_wheel(source, GLMKERN_BUILD="naitve")
    assert wheel is None
    assert "GLMKERN_BUILD is 'naitve'; it can be native, cuda or none" in output


def test_without_torch(source, tmp_path):
    venv.create(tmp_path / "venv")
    packages = tmp_path / "packages"
    packages.mkdir()
    site_packages = Path(importlib.util.find_spec("setuptools").origin).parents[1]
    for folder in [*site_packages.glob("setuptools*"), site_packages / "_distutils_hack"]:
        (packages / folder.name).symlink_to(folder)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run(
        [python, "setup.py", "-q", "bdist_wheel"],
        cwd=source,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(packages), "GLMKERN_BUILD": ""},
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "torch was not installed yet: install torch, then glmkern again" in done.stderr


@pytest.fixture
def setup_module():
    spec = importlib.util.spec_from_file_location("glmkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_is_found_and_read_without_an_import(setup_module, monkeypatch):
    assert setup_module.find_torch().samefile(TORCH)
    version = setup_module.read_version(TORCH)
    assert (version["__version__"], version["cuda"]) == (torch.__version__, torch.version.cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # pip's isolated build
    assert setup_module.find_torch().samefile(TORCH)


@pytest.mark.parametrize(
    ("version", "cuda", "library", "nvcc", "reason"),
    [
        ("2.9.1", "12.8", "_native", None, "it needs torch 2.10 or newer, found 2.9.1"),
        ("2.10.0", None, "_native", None, None),
        ("2.13.0+cpu", None, "_native_cuda", "nvcc", "torch is a CPU build"),
        ("2.13.0", "13.0", "_native_cuda", None, "no nvcc was found: pip install 'glmkern"),
        ("2.13.0", "13.0", "_native_cuda", "nvcc", None),
    ],
)
def test_what_can_be_built(
    setup_module, tmp_path, monkeypatch, version, cuda, library, nvcc, reason
):
    text = f"__version__ = {version!r}\ncuda: str | None = {cuda!r}\n"
    (tmp_path / "version.py").write_text(text)
    monkeypatch.setattr(setup_module, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: nvcc)
    monkeypatch.delenv("GLMKERN_BUILD", raising=False)
    found = setup_module.why_not(library, insist=False)
    assert found is None if reason is None else found.startswith(reason)
    if cuda is None and library == "_native_cuda":
        assert setup_module.why_not(library, insist=True) is None


def inspect(tool, *arguments):
    return subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout


def torch_cpp_symbols(library):
    undefined = inspect("nm", "-D", "-C", "--undefined-only", library)
    return re.findall(r"\b(?:c10|at|torch|caffe2)::.*", undefined)


def test_the_native_library_is_stable_abi_alone():
    assert "aoti_torch_library_init_impl" in inspect("nm", "-D", NATIVE)
    assert torch_cpp_symbols(NATIVE) == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_cuda_library_compiles(tmp_path):
    """For one chip, against whatever torch is here: a CPU build's headers are enough."""
    configure = [
        "-G",
        "Ninja",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        f"-DTORCH_DIR={TORCH}",
        "-DGLMKERN_CUDA=ON",
    ]
    environment = {**os.environ, "PATH": PATH, "GLMKERN_CUDA_ARCHS": "80"}
    for arguments in (configure, ["--build", tmp_path, "--target", "_native_cuda"]):
        done = subprocess.run(
            [shutil.which("cmake", path=PATH), *arguments],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    library = tmp_path / "_native_cuda.so"
    assert torch_cpp_symbols(library) == []
    assert "aoti_torch_get_current_cuda_stream" in inspect("nm", "-D", library)
    assert "cudart" not in inspect("readelf", "-d", library)
    assert ".nv_fatbin" in inspect("readelf", "-S", "-W", library)

    # It loads and registers without a GPU, once somebody has the one symbol of libtorch_cuda.
    stand_in = tmp_path / "libtorch_cuda.c"
    stand_in.write_text("void aoti_torch_get_current_cuda_stream(void) {}")
    inspect("cc", "-shared", "-o", tmp_path / "stand_in.so", stand_in)
    code = f"""if True:
        import ctypes, torch, glmkern
        glmkern.ops
        ctypes.CDLL({str(tmp_path / "stand_in.so")!r}, ctypes.RTLD_GLOBAL)
        torch.ops.load_library({str(library)!r})
        for name in ("rms_norm_fwd", "add_rms_norm_fwd", "rms_norm_bwd", "quant_linear_fwd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key("glmkern_cuda::" + name, "CUDA")
        """
    inspect(sys.executable, "-c", code)
