"""python bench/gpu_report.py: see gpu/report.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # for `bench` itself, in place of its folder

from bench.gpu.report import main  # noqa: E402

if __name__ == "__main__":
    main()
