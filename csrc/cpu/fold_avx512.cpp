// Row kernels for AVX512; compiled with that instruction set's flags (setup.py), called only where the CPU has it.
#include "rows.h"
#include "vec_avx512.h"
#include "vec_portable.h"

namespace mopo {

const RowKernels avx512_kernels = row_kernels<Avx512Float, PortableDouble>();

}  // namespace mopo
