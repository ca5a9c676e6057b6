// Launching: one call for each kernel, a cudaError_t as its answer.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace llmcore::cuda {

// What the current device says of itself; 0 where it can't be asked.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool told =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return told ? value : 0;
}
// 80 for 8.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}
// Of one block.
inline int shared_bytes_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

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
