// Row kernels for AVX2; compiled with that instruction set's flags (setup.py), called only where the CPU has it.
#include "rows.h"
#include "vec_avx2.h"
#include "vec_portable.h"

namespace mopo {

const RowKernels avx2_kernels = row_kernels<Avx2Float, PortableDouble>();

}  // namespace mopo
