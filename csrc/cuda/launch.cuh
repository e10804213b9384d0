// Launching kernels, with errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mopo {

inline void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::string message = std::string("CUDA: ") + cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice)
        message += "; reinstall with this GPU's compute capability in MOPO_CUDA_ARCHS";
    throw std::runtime_error(message);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
    if (blocks > INT32_MAX) throw std::invalid_argument(std::to_string(blocks) + " blocks are more than a launch takes");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace mopo
