"""Compiled from csrc/cuda: functions of _cpu, on the current device, and sums of listed rows; `queue` is a stream."""

from mopo_kernels._cpu import Labels as Labels
from mopo_kernels._cpu import Matrix as Matrix
from mopo_kernels._cpu import Samples as Samples
from mopo_kernels._cpu import Sequences as Sequences
from mopo_kernels._cpu import Settings as Settings
from mopo_kernels._cpu import Tile as Tile
from mopo_kernels._cpu import Transform as Transform
from mopo_kernels._cpu import Typed
from mopo_kernels._cpu import gradient as gradient
from mopo_kernels._cpu import label_statistics as label_statistics
from mopo_kernels._cpu import labels_scratch as labels_scratch
from mopo_kernels._cpu import sample as sample
from mopo_kernels._cpu import sequence_sums as sequence_sums
from mopo_kernels._cpu import statistics as statistics
from mopo_kernels._cpu import statistics_scratch as statistics_scratch

ARCHITECTURES: str  # "8.0,9.0a,12.0+PTX"

def sum_rows(
    start_stop_row: tuple[int, int, int], value: Typed, matrix: Matrix, out: Matrix, queue: int, /
) -> None: ...
