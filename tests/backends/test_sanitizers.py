"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, outside Python."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
PROGRAMS = Path(__file__).parent / "cpu_programs"
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-math-errno", "-fno-sanitize-recover=all"]
ISA_FLAGS = {
    "fold_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "fold_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-omit-frame-pointer"]


ROWS = ["fold.cpp", "fold_portable.cpp", *ISA_FLAGS]
FOLD = [*ROWS, PROGRAMS / "fold_test.cpp"]
SAMPLE = [*ROWS, "sample.cpp", PROGRAMS / "sample_test.cpp"]
BATCH = ["batch.cpp", PROGRAMS / "batch_test.cpp"]


@pytest.mark.slow
@pytest.mark.parametrize("sources", [FOLD, SAMPLE, BATCH], ids=["fold", "sample", "batch"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds the x86 kernels")
def test_the_kernels_run_clean_under_address_and_undefined_behaviour_sanitizers(sources, tmp_path):
    objects = []
    for source in sources:
        target = tmp_path / (Path(source).stem + ".o")
        flags = [*FLAGS, *SANITIZERS, *ISA_FLAGS.get(source, [])]
        subprocess.run(["g++", *flags, f"-I{SOURCES}", "-c", str(SOURCES / source), "-o", str(target)], check=True)
        objects.append(str(target))
    program = tmp_path / "kernels"
    subprocess.run(["g++", *SANITIZERS, *objects, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "ok\n"
