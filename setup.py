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


def say(message):
    print(f"attnkern: {message}", file=sys.stderr, flush=True)


def find_nvcc():
    """nvcc, where torch has CUDA; asked for by ATTNKERN_CUDA=1, refused by 0, found by itself otherwise."""
    import torch

    wanted = os.environ.get("ATTNKERN_CUDA", "auto")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if wanted == "0" or torch.version.cuda is None or nvcc is None:
        why = {"0": "ATTNKERN_CUDA=0"}.get(wanted, "torch has no CUDA" if nvcc else "no nvcc on PATH or in CUDA_HOME")
        if wanted == "1":
            sys.exit(f"attnkern: ATTNKERN_CUDA=1, but the CUDA kernels cannot be built: {why}")
        say(f"building without CUDA kernels: {why}")
        return ""
    # nvcc on PATH may be a wrapper far from its toolkit: the dry run names the real root
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = [line.split("=", 1)[1].strip() for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    return str(Path(top[0]).resolve() / "bin" / "nvcc") if top else nvcc


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11
        import torch.utils.cpp_extension as torch_build

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("ATTNKERN_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DATTNKERN_TORCH_INCLUDE={';'.join(torch_build.include_paths())}",
            f"-DATTNKERN_TORCH_LIB={torch_build.TORCH_LIB_PATH}",
            f"-DATTNKERN_NVCC={find_nvcc()}",
        ]
        if targets := os.environ.get("ATTNKERN_CUDA_ARCHITECTURES"):
            configure.append(f"-DATTNKERN_CUDA_ARCHITECTURES={targets}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count()))], check=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_C*.so")), out)


if importlib.util.find_spec("torch") is None:
    sys.exit("attnkern: torch must be installed before the build; type: pip install torch && pip install --no-build-isolation .")

compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++") or shutil.which("clang++")
if compiler is None:
    say("no C++ compiler found: installing the pure-Python package, which computes through its reference")
setup(ext_modules=[Extension("attnkern._C", [])] if compiler else [], cmdclass={"build_ext": CMakeBuild})
