// Launching: one call for each kernel, a cudaError_t as its answer.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace llmcore::cuda {

// Queues a kernel; dynamic shared memory above 48 KiB has to be asked for first.
template <typename... Arguments>
int launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, int shared_bytes, Stream stream,
           const std::common_type_t<Arguments>&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, size_t(shared_bytes), stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace llmcore::cuda
