// Row kernels for any CPU.
#include "rows.h"
#include "vec_portable.h"

namespace mopo {

const RowKernels portable_kernels = row_kernels<PortableFloat, PortableDouble>();

}  // namespace mopo
