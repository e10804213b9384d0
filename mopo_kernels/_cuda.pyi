"""Compiled from csrc/cuda: the functions of _cpu, on the current device; `queue` is a stream."""

from mopo_kernels._cpu import Labels as Labels
from mopo_kernels._cpu import Sequences as Sequences
from mopo_kernels._cpu import Settings as Settings
from mopo_kernels._cpu import Tile as Tile
from mopo_kernels._cpu import Transform as Transform
from mopo_kernels._cpu import gradient as gradient
from mopo_kernels._cpu import label_statistics as label_statistics
from mopo_kernels._cpu import labels_scratch as labels_scratch
from mopo_kernels._cpu import sequence_sums as sequence_sums
from mopo_kernels._cpu import statistics as statistics
from mopo_kernels._cpu import statistics_scratch as statistics_scratch

ARCHITECTURES: str  # "8.0,9.0a,12.0+PTX"
