"""Build script: everything static stands in pyproject.toml; the compiled CPU kernels join here.

The kernels are an accelerator, not a requirement: where no C++17 compiler is found or it fails, the install goes on
without them, the reference backend runs, and `mopo doctor` says so. MOPO_REQUIRE_KERNELS=1 makes a failed build fatal.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:  # an install without build isolation and without pybind11
    from setuptools.command.build_ext import build_ext

    Pybind11Extension = None

FLAGS = ["-O3", "-fno-math-errno", "-Wall", "-Wextra"]
# OpenMP at compile time only: torch has loaded its runtime globally, and a second one would fight it for the cores.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# Instruction sets are chosen at run time, so their files are compiled with flags that the rest must not have.
X86_FLAGS = {
    "csrc/cpu/fold_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/fold_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-Wno-maybe-uninitialized",  # GCC 12 warns of its own AVX-512 header
    ],
}


class BuildKernels(build_ext):
    """Compiles the files of each instruction set with that set's flags."""

    def build_extension(self, ext: Extension) -> None:
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


def kernels() -> list[Extension]:
    if Pybind11Extension is None or sys.platform == "win32":
        return []
    extension = Pybind11Extension(
        "mopo_kernels._cpu",
        ["csrc/cpu/fold.cpp", "csrc/cpu/fold_portable.cpp", "csrc/cpu/batch.cpp", "csrc/cpu/bindings.cpp"],
        depends=["csrc/objective.h", *sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))],
        cxx_std=17,
        extra_compile_args=[*FLAGS, *OPENMP],
    )
    extension.optional = os.environ.get("MOPO_REQUIRE_KERNELS") != "1"
    return [extension]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
