// A CUDA runtime without a GPU: what nvcc's host code calls, down to the launch, which it hands to the simulator.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace {

struct Dim {
  unsigned x, y, z;
};
using Simulate = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                         size_t shared_bytes);

std::map<const void*, std::string> kernels;
Simulate simulate = nullptr;
struct {
  Dim grid, block;
  size_t shared_bytes;
  void* stream;
} pushed;

}  // namespace

extern "C" {

void set_simulator(Simulate function) { simulate = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels[host] = name;
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}

int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared_bytes, void*) {
  return simulate(kernels.at(kernel).c_str(), &grid.x, &block.x, arguments, shared_bytes);
}
int cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared_bytes, void* stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaGetLastError() { return 0; }

}  // extern "C"
