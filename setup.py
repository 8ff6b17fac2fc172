"""Finds torch and nvcc, drives CMake and installs attnkern._C; metadata is in pyproject.toml."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def say(message):
    print(f"attnkern: {message}", file=sys.stderr, flush=True)


def find_nvcc():
    """nvcc, where torch has CUDA: ATTNKERN_CUDA=1 insists on it, 0 leaves it out."""
    import torch

    wanted = os.environ.get("ATTNKERN_CUDA", "auto")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if wanted == "0":
        why = "ATTNKERN_CUDA=0"
    elif torch.version.cuda is None:
        why = "this torch has no CUDA"
    elif nvcc is None:
        why = "no nvcc on PATH or in CUDA_HOME"
    else:
        # nvcc may be a wrapper far from its toolkit: the dry run names the real root
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
        top = next((line.split("=", 1)[1].strip() for line in lines if "TOP=" in line), None)
        return str(Path(top).resolve() / "bin" / "nvcc") if top else nvcc
    if wanted == "1":
        sys.exit(f"attnkern: ATTNKERN_CUDA=1, but the CUDA kernels cannot be built: {why}")
    say(f"building without CUDA kernels: {why}")
    return ""


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11
        import torch.utils.cpp_extension as torch_build

        build = Path(os.environ.get("ATTNKERN_BUILD_DIR", DEFAULT_BUILD))
        settings = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ATTNKERN_TORCH_INCLUDE": ";".join(torch_build.include_paths()),
            "ATTNKERN_TORCH_LIB": torch_build.TORCH_LIB_PATH,
            "ATTNKERN_NVCC": find_nvcc(),
        }
        if targets := os.environ.get("ATTNKERN_CUDA_ARCHITECTURES"):
            settings["ATTNKERN_CUDA_ARCHITECTURES"] = targets
        cache = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *cache], check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_C*.so")), out)


if importlib.util.find_spec("torch") is None:
    sys.exit(
        "attnkern: torch must be installed before the build; "
        "type: pip install torch && pip install --no-build-isolation ."
    )
compilers = (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")
if any(map(shutil.which, compilers)):
    extensions = [Extension("attnkern._C", [])]
else:
    say("no C++ compiler was found: installing pure Python, which computes by its reference")
    extensions = []
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
