// A CUDA runtime without a GPU: what nvcc's host code calls, down to the launch, which it hands to the simulator.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Dim {
  unsigned x, y, z;
};
using Simulate = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                         size_t shared_bytes);

// A tensor map as tests/ptxsim/bulk_copies.py reads it: the driver's own 128 bytes are not documented.
struct Map {
  uint64_t address;
  uint32_t rank, itemsize, swizzle, unused;
  uint64_t sizes[5], strides[5];
  uint32_t box[5];
};
static_assert(sizeof(Map) <= 128);

// cuTensorMapEncodeTiled, of 16-bit types, with what its manual asks of its arguments.
int encode_map(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
               const uint32_t* box, const uint32_t* every, int interleave, int swizzle, int, int fill) {
  constexpr int INVALID = 1, FLOAT16 = 6, BFLOAT16 = 9;
  constexpr uint32_t WIDEST[] = {256 * 2, 32, 64, 128};
  Map made{uint64_t(address), rank, 2, uint32_t(swizzle), 0, {}, {}, {}};
  bool valid = (type == FLOAT16 || type == BFLOAT16) && rank >= 1 && rank <= 5 && interleave == 0 && fill == 0 &&
               uint64_t(map) % 64 == 0 && made.address % 16 == 0 && made.address != 0 && swizzle >= 0 && swizzle <= 3;
  for (uint32_t axis = 0; valid && axis < rank; ++axis) {
    made.sizes[axis] = sizes[axis], made.box[axis] = box[axis];
    made.strides[axis] = axis == 0 ? made.itemsize : strides[axis - 1];
    valid = sizes[axis] >= 1 && sizes[axis] <= uint64_t(1) << 32 && box[axis] >= 1 && box[axis] <= 256 &&
            every[axis] == 1 && made.strides[axis] < uint64_t(1) << 40;
    if (axis > 0) valid = valid && made.strides[axis] % 16 == 0 && made.strides[axis] > 0;
  }
  valid = valid && box[0] * made.itemsize % 16 == 0 && box[0] * made.itemsize <= WIDEST[swizzle];
  if (!valid) return INVALID;
  std::memcpy(map, &made, sizeof made);
  return 0;
}

int capability = 80;
std::map<const void*, std::string> kernels;
Simulate simulate = nullptr;
struct {
  Dim grid, block;
  size_t shared_bytes;
  void* stream;
} pushed;

}  // namespace

extern "C" {

void set_simulator(Simulate function, int of_capability) { simulate = function, capability = of_capability; }

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
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int MAJOR = 75, MINOR = 76, SHARED_BYTES = 97;
  if (attribute == MAJOR) *value = capability / 10;
  if (attribute == MINOR) *value = capability % 10;
  if (attribute == SHARED_BYTES) *value = (capability == 80 ? 163 : capability == 90 ? 227 : 99) * 1024;
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* status) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_map) : nullptr;
  *status = known ? 0 : 1;
  return 0;
}

}  // extern "C"
