"""Builds the native libraries with CMake against the torch that is installed already.

Without torch or a compiler the package installs without them, and `glmkern.backends()` tells why:
the reasons are kept in glmkern/_build.json. GLMKERN_BUILD changes that: `native` and `cuda` make it
an error if _native, or _native and _native_cuda, cannot be built; `none` builds nothing.
"""

import ast
import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = {"_native": ("native", "cuda"), "_native_cuda": ("cuda",)}  # who insists on it
MINIMUM_TORCH = (2, 10)
# Without build isolation, and in an environment that was not activated, cmake and ninja are here.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")


def find_torch() -> Path | None:
    """The folder of the user's torch, never imported. In pip's isolated build find_spec does not
    see the environment that glmkern is installed into, but its paths are this interpreter's."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    folders += [*site.getsitepackages(), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    candidates = (Path(folder) / "torch" for folder in folders)
    return next((torch for torch in candidates if (torch / "version.py").is_file()), None)


def read_version(torch: Path) -> dict[str, str | None]:
    """`__version__` and `cuda` of torch/version.py."""
    values = {}
    for node in ast.parse((torch / "version.py").read_text()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            values[target.id] = node.value.value
    return values


def find_nvcc() -> str | None:
    """CUDACXX, CUDA_HOME's, the one in PATH, the one of the extra `nvcc`, CUDA's usual place."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += [Path(nvcc).parents[1] for nvcc in filter(None, [shutil.which("nvcc")])]
    homes += [*find_torch().parent.glob("nvidia/*"), Path("/usr/local/cuda")]
    return next((str(home / "bin/nvcc") for home in homes if (home / "bin/nvcc").is_file()), None)


def why_not(library: str, insist: bool) -> str | None:
    """None where `library` can be built here, or the reason and its cure."""
    if os.environ.get("GLMKERN_BUILD") == "none":
        return "GLMKERN_BUILD=none was set"
    torch = find_torch()
    if torch is None:
        return (
            "torch was not installed yet: install torch, then glmkern again "
            "(with uv: --no-build-isolation)"
        )
    version = read_version(torch)
    if tuple(int(part) for part in version["__version__"].split(".")[:2]) < MINIMUM_TORCH:
        return f"it needs torch 2.10 or newer, found {version['__version__']}"
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return "no C++ compiler was found: install g++ or clang++, then glmkern again"
    if not (shutil.which("cmake") and shutil.which("ninja")):
        return "CMake or Ninja is missing: pip install cmake ninja, then glmkern again"
    if library == "_native_cuda":
        if version.get("cuda") is None and not insist:
            return "torch is a CPU build"
        if find_nvcc() is None:
            return (
                "no nvcc was found: pip install 'glmkern[nvcc]', then glmkern again "
                "(Triton serves newer GPUs without it)"
            )
    return None


def build(library: str, destination: Path) -> None:
    """Compiles one CMake target and puts it at `destination`. CalledProcessError if it fails."""
    folder = ROOT / "build" / library.strip("_")
    options = {"TORCH_DIR": find_torch(), "CMAKE_MAKE_PROGRAM": shutil.which("ninja")}
    if library == "_native_cuda":
        options |= {"GLMKERN_CUDA": "ON", "CMAKE_CUDA_COMPILER": find_nvcc()}
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *defines], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", library], check=True)
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / f"{library}.so", destination)


class BuildNative(build_ext):
    def run(self):
        wanted = os.environ.get("GLMKERN_BUILD", "")
        if wanted not in ("", "native", "cuda", "none"):
            sys.exit(f"GLMKERN_BUILD is {wanted!r}; it can be native, cuda or none")
        self.reasons = {}
        super().run()
        package = (ROOT if self.inplace else Path(self.build_lib)) / "glmkern"
        for library, reason in self.reasons.items():
            if reason:  # not even one that an earlier editable install left
                (package / f"{library}.so").unlink(missing_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(self.reasons, indent=2) + "\n")

    def build_extension(self, ext):
        library = ext.name.rpartition(".")[2]
        insist = os.environ.get("GLMKERN_BUILD") in LIBRARIES[library]
        reason = why_not(library, insist)
        if reason is None:
            try:
                build(library, Path(self.get_ext_fullpath(ext.name)))
            except subprocess.CalledProcessError:
                reason = "it did not compile: pip install -v shows the compiler's messages"
        if reason is not None and insist:
            sys.exit(f"{library} could not be built: {reason}")
        print(
            f"glmkern: {library} {'was built' if reason is None else 'skipped: ' + reason}",
            file=sys.stderr,
        )
        self.reasons[library] = reason

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"  # no Python.h: one file for every Python


class Wheel(bdist_wheel):
    def get_tag(self):
        native = any((Path(self.get_finalized_command("build").build_lib) / "glmkern").glob("*.so"))
        return "py3", "none", super().get_tag()[2] if native else "any"


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"glmkern.{name}", [], optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
