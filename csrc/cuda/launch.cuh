// Launching: one call for each kernel, a cudaError_t as its answer.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace llmcore::cuda {

// Of the current device: 80 for 8.0; 0 where it can't be asked.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

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
