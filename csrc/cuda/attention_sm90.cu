// attention, forward, for sm_90: warps that copy and warps that multiply (Shah et al., FlashAttention-3, 2024, sections
// 3.1 and 3.2), the softmax online as in attention.cu, with the same numbers.
//
// A block has 128 queries of a head, each of two warpgroups 64 of them; a warp of a third keeps copies of K and V under
// way, two blocks of 128 keys ahead, by tensor maps. Barriers in shared memory say which tiles are full and which are
// empty again. While a block's weights multiply its values, the next one's scores are on their way: a warpgroup has two
// products under way and its exponentials run beside them. Q and K are read by the products from shared memory, the
// weights come from registers. Bound by the tensor cores at D = 128; at D = 64 the exponential unit, which does one for
// 4 D operations, is as busy. Q, K, V and the result move once each way.
#include "attention.cuh"
#include "warpgroup.cuh"

namespace llmcore::cuda {

template <int D>
struct WarpgroupShape {
  static constexpr int CONSUMERS = 2, THREADS = WARPGROUP * (1 + CONSUMERS), BLOCK_M = 64 * CONSUMERS;
  static constexpr int BLOCK_N = 128, STAGES = 2, PANELS = D / PANEL;
  static constexpr int Q_PANEL_BYTES = BLOCK_M * PANEL * 2, PANEL_BYTES = BLOCK_N * PANEL * 2;
  static constexpr int Q_BYTES = PANELS * Q_PANEL_BYTES, TILE_BYTES = PANELS * PANEL_BYTES;
  static constexpr int TILES_BYTES = Q_BYTES + 2 * STAGES * TILE_BYTES, BARRIERS = 2 + 4 * STAGES;
  static constexpr int SHARED_BYTES = 1024 + TILES_BYTES + BARRIERS * 8;  // the first is for the tiles' alignment
};

struct Maps {
  CUtensorMap q, k, v;
};

// Where a block's tiles and barriers are.
template <int D>
struct Places {
  using Shape = WarpgroupShape<D>;
  uint32_t start;

  __device__ uint32_t q() const { return start; }
  __device__ uint32_t k(int stage) const { return start + Shape::Q_BYTES + stage * Shape::TILE_BYTES; }
  __device__ uint32_t v(int stage) const { return k(Shape::STAGES + stage); }
  __device__ uint32_t barrier(int index) const { return start + Shape::TILES_BYTES + index * 8; }
  __device__ uint32_t q_full() const { return barrier(0); }
  __device__ uint32_t landed() const { return barrier(1); }
  __device__ uint32_t k_full(int stage) const { return barrier(2 + stage); }
  __device__ uint32_t v_full(int stage) const { return barrier(2 + Shape::STAGES + stage); }
  __device__ uint32_t k_empty(int stage) const { return barrier(2 + 2 * Shape::STAGES + stage); }
  __device__ uint32_t v_empty(int stage) const { return barrier(2 + 3 * Shape::STAGES + stage); }

  __device__ void init_barriers() const {
    init_barrier(q_full(), 1);
    init_barrier(landed(), 1);
    for (int stage = 0; stage < Shape::STAGES; ++stage) {
      init_barrier(k_full(stage), 1);
      init_barrier(v_full(stage), 1);
      init_barrier(k_empty(stage), Shape::CONSUMERS * WARPS);  // of each warp one lane arrives
      init_barrier(v_empty(stage), Shape::CONSUMERS * WARPS);
    }
    fence_async();
  }
};

// One warp: Q once, then K and V of each block as soon as a stage is empty.
template <int D>
__device__ void produce(const Maps& maps, const Places<D>& at, const KeyBlocks& blocks, const Keys& keys, int first_row,
                        int h, int g, int b, int64_t S, int lane) {
  using Shape = WarpgroupShape<D>;
  const auto copy = [&](uint32_t tile, const CUtensorMap& map, int row, int head, int panel_bytes, uint32_t barrier) {
    arrive_expecting(barrier, Shape::PANELS * panel_bytes);
#pragma unroll
    for (int panel = 0; panel < Shape::PANELS; ++panel) {
      copy_box(tile + panel * panel_bytes, map, panel * PANEL, row, head, b, barrier);
    }
  };
  if (lane == 0) copy(at.q(), maps.q, first_row, h, Shape::Q_PANEL_BYTES, at.q_full());
  for (int block = blocks.first; block < blocks.end; ++block) {
    const int turn = block - blocks.first, stage = turn % Shape::STAGES, emptied = (turn / Shape::STAGES & 1) ^ 1;
    const int key = block * Shape::BLOCK_N, valid = keys.length - key;
    wait(at.k_empty(stage), emptied);
    if (lane == 0) copy(at.k(stage), maps.k, key, g, Shape::PANEL_BYTES, at.k_full(stage));
    wait(at.v_empty(stage), emptied);
    if (valid >= Shape::BLOCK_N || keys.length == S) {
      if (lane == 0) copy(at.v(stage), maps.v, key, g, Shape::PANEL_BYTES, at.v_full(stage));
      continue;
    }
    // Rows behind the last key may hold anything, and NaN times a weight of 0 is NaN.
    if (lane == 0) copy(at.v(stage), maps.v, key, g, Shape::PANEL_BYTES, at.landed());
    wait(at.landed(), 0);
    for (int panel = 0; panel < Shape::PANELS; ++panel) {
      const uint32_t rows = at.v(stage) + panel * Shape::PANEL_BYTES;
      for (int i = valid * PANEL * 2 + lane * 16; i < Shape::PANEL_BYTES; i += 32 * 16) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(rows + i), "r"(0) : "memory");
      }
    }
    fence_async();
    __syncwarp();
    if (lane == 0) arrive(at.v_full(stage));
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(WarpgroupShape<D>::THREADS, 1)
    attention_forward_sm90_kernel(const AttentionForward op, const __grid_constant__ Maps maps) {
  using Shape = WarpgroupShape<D>;
  constexpr int N = Shape::BLOCK_N / 8;
  const AttentionProblem& p = op.problem;
  extern __shared__ __align__(1024) char shared[];
  const Places<D> at{(shared_address(shared) + 1023) & ~1023u};
  const int lane = threadIdx.x % 32, warpgroup = threadIdx.x / WARPGROUP, warp = threadIdx.x / 32 % WARPS;
  const int64_t b = blockIdx.z, h = blockIdx.y, g = h / (p.H / p.G);
  const int64_t first_row = int64_t(gridDim.x - 1 - blockIdx.x) * Shape::BLOCK_M;  // the longest causal rows first
  const int rows = int(p.T - first_row < Shape::BLOCK_M ? p.T - first_row : Shape::BLOCK_M);
  const Keys keys(p, b);
  const KeyBlocks blocks(keys, first_row, first_row + rows - 1, Shape::BLOCK_N);
  if (threadIdx.x == 0) at.init_barriers();
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<24>();
    if (warp == 0) produce<D>(maps, at, blocks, keys, int(first_row), int(h), int(g), int(b), p.S, lane);
    return;
  }
  take_registers<240>();
  const int own = 64 * (warpgroup - 1);  // this warpgroup's first row
  const Scores scores(p);
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  const auto stage_of = [&](int block) { return (block - blocks.first) % Shape::STAGES; };
  const auto parity_of = [&](int block) { return (block - blocks.first) / Shape::STAGES & 1; };

  float s[1][N][4], out[1][D / 8][4] = {}, decay[1][2];
  uint32_t weights[N / 2][4];
  OnlineSoftmax<1> softmax;
  const auto start_scores = [&](int block) {
    wait(at.k_full(stage_of(block)), parity_of(block));
    hold(s[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int panel = step * 16 / PANEL, across = step * 16 % PANEL * 2;
      const uint32_t q = at.q() + panel * Shape::Q_PANEL_BYTES + own * PANEL * 2 + across;
      const uint32_t k = at.k(stage_of(block)) + panel * Shape::PANEL_BYTES + across;
      multiply_rows_async<T>(s[0], operand(q, 0), operand(k, 0), step > 0);
    }
    commit_products();
  };
  const auto start_values = [&](int block) {
    wait(at.v_full(stage_of(block)), parity_of(block));
    hold(out[0]);
    hold(weights);
    fence_products();
#pragma unroll
    for (int step = 0; step < N / 2; ++step) {
      const uint32_t v = at.v(stage_of(block)) + step * 16 * PANEL * 2;
      multiply_columns_async<T>(out[0], weights[step], operand(v, Shape::PANEL_BYTES));
    }
    commit_products();
  };
  const auto weigh = [&](int block) {
    scores.cap(s);
    if (blocks.cuts(block)) {
      mask_outside<false>(s, keys, first_row + own + 16 * warp, block * Shape::BLOCK_N, -INFINITY, lane);
    }
    softmax.weigh(s, decay, scores.factor);
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int step = 0; step < N / 2; ++step) pack_left<T>(weights[step], s[0][2 * step], s[0][2 * step + 1]);
  };

  wait(at.q_full(), 0);
  if (blocks.first < blocks.end) {
    start_scores(blocks.first);
    wait_products<0>();
    hold(s[0]);
    release(at.k_empty(stage_of(blocks.first)));
    weigh(blocks.first);
    round_weights();
    for (int block = blocks.first + 1; block < blocks.end; ++block) {
      start_scores(block);
      start_values(block - 1);
      wait_products<1>();
      hold(s[0]);
      release(at.k_empty(stage_of(block)));
      weigh(block);
      wait_products<0>();
      hold(out[0]);
      release(at.v_empty(stage_of(block - 1)));
      softmax.scale(out, decay);
      round_weights();
    }
    start_values(blocks.end - 1);
    wait_products<0>();
    hold(out[0]);
  }

  float factor[1][2];
  const int warp_row = own + 16 * warp;
  softmax.finish(factor, op.lse + (b * p.H + h) * p.T + first_row + warp_row, rows - warp_row, scores.factor, lane);
  // By way of this warp's rows of Q's tile, when no product of the warpgroup reads them any more.
  asm volatile("bar.sync %0, %1;" ::"r"(warpgroup), "n"(WARPGROUP) : "memory");
  T* y = static_cast<T*>(op.out) + b * op.out_strides[0] + h * op.out_strides[1] +
         (first_row + warp_row) * op.out_strides[2];
#pragma unroll
  for (int panel = 0; panel < Shape::PANELS; ++panel) {
    const uint32_t tile = at.q() + panel * Shape::Q_PANEL_BYTES + warp_row * PANEL * 2;
    store_tile<T, PANEL>(tile, reinterpret_cast<const float (&)[1][PANEL / 8][4]>(out[0][panel * PANEL / 8]), factor,
                         lane);
    __syncwarp();
    write_tile<T, PANEL, 16>(tile, y + panel * PANEL, op.out_strides[2], rows - warp_row, lane);
  }
}

// --- The host's side ---

namespace {

// The driver's function, whose library is not linked.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encode() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<Encode>(error == cudaSuccess && status == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  return found;
}

// A map of (batch, heads, positions, width) in boxes of `rows` positions and a panel's columns.
int make_map(CUtensorMap& map, const void* data, const AttentionProblem& p, int64_t heads, int64_t positions,
             const int64_t (&strides)[3], int rows) {
  const Encode function = encode();
  if (function == nullptr) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[4] = {cuuint64_t(p.D), cuuint64_t(positions), cuuint64_t(heads), cuuint64_t(p.B)};
  // The stride of an axis of one element counts for nothing but must be valid.
  const auto stride = [](int64_t elements, int64_t size) { return cuuint64_t(size == 1 ? 16 : elements * 2); };
  const cuuint64_t steps[3] = {stride(strides[2], positions), stride(strides[1], heads), stride(strides[0], p.B)};
  const cuuint32_t box[4] = {PANEL, cuuint32_t(rows), 1, 1}, every[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      p.dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      function(&map, type, 4, const_cast<void*>(data), sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

bool attention_fits_sm90(const AttentionProblem& p) {
  const auto has_steps = [&](const int64_t (&strides)[3], int64_t heads, int64_t positions) {
    const int64_t sizes[3] = {p.B, heads, positions};
    bool fits = true;
    for (int i = 0; i < 3; ++i) fits = fits && (sizes[i] == 1 || (strides[i] > 0 && strides[i] < int64_t(1) << 39));
    return fits;
  };
  return p.S > 0 && p.T < INT32_MAX && p.S < INT32_MAX && has_steps(p.q_strides, p.H, p.T) &&
         has_steps(p.k_strides, p.G, p.S) && has_steps(p.v_strides, p.G, p.S);
}

// 2 dtypes x 2 widths = 4 builds.
int attention_forward_sm90(const AttentionForward& op, Stream stream) {
  const AttentionProblem& p = op.problem;
  if (!takes_tensor_cores(p) || !attention_fits_sm90(p)) return cudaErrorInvalidValue;
  return with_type_and_width(p, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int D = decltype(width)::value;
    using Shape = WarpgroupShape<D>;
    Maps maps;
    int error = make_map(maps.q, p.q, p, p.H, p.T, p.q_strides, Shape::BLOCK_M);
    if (error == cudaSuccess) error = make_map(maps.k, p.k, p, p.G, p.S, p.k_strides, Shape::BLOCK_N);
    if (error == cudaSuccess) error = make_map(maps.v, p.v, p, p.G, p.S, p.v_strides, Shape::BLOCK_N);
    if (error != cudaSuccess) return error;
    const dim3 grid(unsigned(ceil_div(p.T, Shape::BLOCK_M)), unsigned(p.H), unsigned(p.B));
    return launch(attention_forward_sm90_kernel<T, D>, grid, dim3(Shape::THREADS), Shape::SHARED_BYTES, stream, op,
                  maps);
  });
}

}  // namespace llmcore::cuda
