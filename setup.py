"""Build script: everything static stands in pyproject.toml; the compiled kernels join here.

The kernels are an accelerator, not a requirement: where one of the two extensions cannot be built, the install goes on
without it, another backend runs, and `mopo doctor` says so.

    mopo_kernels._cpu    with a C++17 compiler
    mopo_kernels._cuda   with nvcc and a torch that has CUDA. An isolated build sees no torch, so use the one that is
                         installed: pip install "setuptools>=77" pybind11; pip install --no-build-isolation ...

Environment: MOPO_REQUIRE_KERNELS=1 makes a failed build fatal. MOPO_BUILD_CUDA=1 builds _cuda whatever torch is there,
and fails where something else is missing; MOPO_BUILD_CUDA=0 leaves it out. MOPO_CUDA_ARCHS="8.0 9.0a 12.0+PTX" names
compute capabilities.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import CompileError
from setuptools.modified import newer_group

try:
    import pybind11
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:  # an install without build isolation and without pybind11
    from setuptools.command.build_ext import build_ext

    Pybind11Extension = None

SHARED_HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))

FLAGS = ["-O3", "-fno-math-errno", "-Wall", "-Wextra"]
# OpenMP at compile time only: torch has loaded its runtime globally, and a second one would fight it for the cores.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# Instruction sets are chosen at run time, so their files are compiled with flags that the rest must not have.
X86_FLAGS = {
    "csrc/cpu/fold_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/fold_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 warns of its own AVX-512 header
    ],
}

CUDA_SOURCES = ["csrc/cuda/fold.cu", "csrc/cuda/sample.cu", "csrc/cuda/batch.cu"]
CUDA_ARCHS = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
NVCC_FLAGS = [
    *("-O3", "-std=c++17"),
    "--ftz=true",  # a probability below 2^-126 is 0, which makes exp2 one instruction
    "--fmad=false",  # z is rounded before the maximum is taken off, as on the CPU: the largest z gives exp(0) = 1
    "--compiler-options=-fPIC,-fvisibility=hidden,-Wall",
]


class BuildKernels(build_ext):
    """Compiles the files of each instruction set with that set's flags, and the CUDA extension with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "mopo_kernels._cuda":
            self.build_cuda(ext)
            return
        if platform.machine().lower() in ("x86_64", "amd64"):
            for source, flags in X86_FLAGS.items():
                ext.extra_objects += self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args, *flags],
                    depends=ext.depends,
                )
        super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        """Compile and link in one call of nvcc, which brings the CUDA runtime along as a static library."""
        module, done = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / "cuda.command"
        includes = [f"-I{path}" for path in [*ext.include_dirs, *self.include_dirs]]
        command = [*ext.extra_compile_args, *includes, *ext.sources, "-shared", "-o", str(module)]
        is_same = done.exists() and done.read_text() == " ".join(command)  # architectures too
        if is_same and not self.force and not newer_group([*ext.sources, *ext.depends], str(module)):
            return
        module.parent.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        print(*command)
        if subprocess.run(command).returncode != 0:
            raise CompileError("nvcc could not build the CUDA kernels; its messages stand above")
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(" ".join(command))


def extensions() -> list[Extension]:
    return [*cpu_extensions(), *cuda_extensions()]


def cpu_extensions() -> list[Extension]:
    if Pybind11Extension is None or sys.platform == "win32":
        return []
    extension = Pybind11Extension(
        "mopo_kernels._cpu",
        [
            "csrc/cpu/fold.cpp",
            "csrc/cpu/fold_portable.cpp",
            "csrc/cpu/sample.cpp",
            "csrc/cpu/batch.cpp",
            "csrc/cpu/bindings.cpp",
        ],
        depends=[*SHARED_HEADERS, *sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))],
        cxx_std=17,
        extra_compile_args=[*FLAGS, *OPENMP],
    )
    extension.optional = os.environ.get("MOPO_REQUIRE_KERNELS") != "1"
    return [extension]


def cuda_extensions() -> list[Extension]:
    choice = os.environ.get("MOPO_BUILD_CUDA")
    if choice == "0":
        return []
    why_not = missing_for_cuda() or ("" if choice == "1" else unfit_for_torch())
    if why_not and choice == "1":
        raise SystemExit(f"MOPO_BUILD_CUDA=1, but {why_not}")
    if why_not:
        print(f"mopo_kernels._cuda is left out: {why_not}", file=sys.stderr)
        return []
    nvcc = find_nvcc()
    names = architectures(nvcc)
    extension = Extension(
        "mopo_kernels._cuda",
        [*CUDA_SOURCES, "csrc/cuda/bindings.cpp"],
        depends=[*SHARED_HEADERS, *sorted(str(path) for path in Path("csrc/cuda").glob("*h"))],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[
            *(nvcc, *NVCC_FLAGS, "--threads=0", f'-DMOPO_CUDA_ARCHS="{",".join(names)}"'),
            *code_generation(names),
        ],
    )
    extension.optional = choice != "1" and os.environ.get("MOPO_REQUIRE_KERNELS") != "1"
    return [extension]


def missing_for_cuda() -> str:
    """What a build of the CUDA kernels lacks, and how to mend it."""
    if sys.platform == "win32":
        return "Windows is not supported: build under WSL"
    if Pybind11Extension is None:
        return "pybind11 is missing: pip install pybind11"
    if find_nvcc() is None:
        return "nvcc is missing: install the CUDA toolkit, then put nvcc on the PATH or set CUDA_HOME"
    return ""


def unfit_for_torch() -> str:
    """Why the CUDA kernels would be of no use to the torch that is installed."""
    try:
        from torch.version import cuda
    except ImportError:
        cuda = None
    if cuda is None:
        return "no torch with CUDA is in sight (an isolated build sees none: pip install --no-build-isolation)"
    release = re.search(r"release (\d+)", subprocess.check_output([find_nvcc(), "--version"], text=True))
    if release and int(release[1]) > int(cuda.split(".")[0]):
        return f"nvcc of CUDA {release[1]} may need a newer driver than torch of CUDA {cuda} (MOPO_BUILD_CUDA=1 builds)"
    return ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def architectures(nvcc: str) -> list[str]:
    """The compute capabilities asked for, else those of CUDA_ARCHS that this nvcc knows."""
    asked = os.environ.get("MOPO_CUDA_ARCHS")
    if asked:
        return asked.split()
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    return [name for name in CUDA_ARCHS.split() if "sm_" + "".join(re.findall(r"\d", name)) in known]


def code_generation(names: list[str]) -> list[str]:
    """nvcc's options for names such as "9.0a", or "12.0+PTX" for code that later GPUs can compile too."""
    options = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"MOPO_CUDA_ARCHS must be like {CUDA_ARCHS!r}; got {name!r}")
        number = match[1] + match[2]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
