// stream_gemm.cu   y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias), overwriting or added to   bf16 in, f32 sums, bf16 or f32 out; Hopper (sm_90a) alone
// Shapes  x [m, k]; w [n, k]; bias [n] in y's dtype or null; y [m, n]
// Layout  row-major; x and w by tensor maps: boxes of 64 columns with the 128-byte swizzle, of TILE rows of w and of ROWS rows of x
// Launch  grid (splits, ceil(n / TILE)), clusters of the splits; block 160 for tiles of 64, else 288: a warpgroup or two that multiply, a warp
//         that copies; dynamic shared `stages` times a tile of w and one of x, plus 1024 bytes
// Cost    flops 2·m·n·k; bytes 2·n·k (+ x for each tile, from L2): bandwidth is the roof
// Limits  k % 8 == 0; n % 8 == 0; m <= ROWS; splits <= 8
// Method  w is the left operand of the warpgroup instructions, so that the rows of x, however few, are their flexible side. A ring of stages is
//         filled by the bulk copy engine. The ring's first round of w is asked for before the kernel before this one has ended: weights are
//         read without a pause, whatever small kernels lie between. Splits of k meet in one cluster and are added in their order through
//         distributed shared memory, so that there are neither atomics nor a workspace. gemm.rs takes it where it measures faster than cuBLASLt
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int ROWS, int TILE>
DEVICE void stream_gemm(const TensorMap& w_map, const TensorMap& x_map, const GemmArgs& args) {
  constexpr int WARPGROUPS = TILE == 64 ? 1 : 2, PARTS = TILE / 64 / WARPGROUPS;  // of 64 columns of y, for each warpgroup
  constexpr int COPIER = 4 * WARPGROUPS, THREADS = 32 * COPIER + 32;
  constexpr int W_BYTES = TILE * DEPTH * 2, X_BYTES = ROWS * DEPTH * 2, STAGE_BYTES = W_BYTES + X_BYTES;
  constexpr int STRIDE = TILE + 4;  // of the sums in shared memory: neighbouring rows two apart lie 8 banks apart
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
  unsigned char* stages = dynamic_shared + (1024 - (shared_address(dynamic_shared) & 1023)) % 1024;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_splits = args.num_splits, split = blockIdx.x;  // which is the rank in the cluster
  const int column0 = blockIdx.y * TILE;
  const int all_steps = (args.k + DEPTH - 1) / DEPTH;
  const int first = all_steps * split / num_splits;
  const int num_steps = all_steps * (split + 1) / num_splits - first;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < args.num_stages; stage++) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], COPIER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp == COPIER) {
    if (lane == 0) {
      auto load_w = [&](int stage, int step) {
        barrier_expect(&full[stage], STAGE_BYTES);
        copy_box(stages + stage * STAGE_BYTES, &w_map, &full[stage], (first + step) * DEPTH, column0, EVICT_FIRST);
      };
      auto load_x = [&](int stage, int step) {
        copy_box(stages + stage * STAGE_BYTES + W_BYTES, &x_map, &full[stage], (first + step) * DEPTH, 0, EVICT_LAST);
      };
      const int ahead = min(args.num_stages, num_steps);
      for (int step = 0; step < ahead; step++) load_w(step, step);
      wait_for_previous_kernel();
      // Not before: x is complete when the next kernel starts, see `x_is_ready` of lora_shrink.cu.
      allow_next_kernel();
      for (int step = 0; step < ahead; step++) load_x(step, step);
      int stage = 0, parity = 0;
      for (int step = ahead; step < num_steps; step++) {
        barrier_wait(&empty[stage], parity);
        load_w(stage, step);
        load_x(stage, step);
        advance(stage, parity, args.num_stages);
      }
    }
    __syncwarp();
    wait_for_previous_kernel();
    __syncthreads();
  } else {
    float acc[PARTS][ROWS / 2] = {};
    const int warpgroup = warp / 4;
    int stage = 0, parity = 0, last = 0;
    for (int step = 0; step < num_steps; step++) {
      barrier_wait(&full[stage], parity);
      const unsigned char* w_tile = stages + stage * STAGE_BYTES + warpgroup * PARTS * 64 * DEPTH * 2;
      const uint64_t x = matrix_descriptor(stages + stage * STAGE_BYTES + W_BYTES);
      warpgroup_begin();
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const uint64_t w = matrix_descriptor(w_tile + part * 64 * DEPTH * 2);
        // 16 columns are 32 bytes, in units of 16.
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) warpgroup_mma(acc[part], w + 2 * i, x + 2 * i);
      }
      warpgroup_commit();
      // The step before is done: its stage may be filled again.
      warpgroup_wait<1>();
      if (step > 0 && lane == 0) barrier_arrive(&empty[last]);
      last = stage;
      advance(stage, parity, args.num_stages);
    }
    warpgroup_wait<0>();
    wait_for_previous_kernel();
    // Every stage has been read once all have come here. The copier has no part in it and comes all the same, at no cost since it has long
    // been done: where it had passed a barrier less than the others, racecheck took its reads of the sums below for unordered.
    __syncthreads();
    // acc[part][4j..]: columns g and g + 8 of the warp's 16, rows 8j + 2t and the next.
    float* sums = reinterpret_cast<float*>(stages);
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      const int column = (warpgroup * PARTS + part) * 64 + warp % 4 * 16 + g;
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) {
        float* to = sums + (8 * j + 2 * t) * STRIDE + column;
        to[0] = acc[part][4 * j];
        to[STRIDE] = acc[part][4 * j + 1];
        to[8] = acc[part][4 * j + 2];
        to[STRIDE + 8] = acc[part][4 * j + 3];
      }
    }
  }
  __syncthreads();

  // Every block of the cluster writes its rows of the sum.
  const float* all_sums = reinterpret_cast<const float*>(stages);
  put_sums<ROWS, TILE, STRIDE, THREADS>(args, all_sums, split, num_splits, 0, 1, column0, [&] {
    __syncwarp();
    if (num_splits > 1) cluster_barrier();
  });
  // No block leaves while another one reads its sums.
  if (num_splits > 1) {
    __syncwarp();
    cluster_barrier();
  }
}
#else
// Elsewhere the launcher does not take it.
template <int ROWS, int TILE>
DEVICE void stream_gemm(const TensorMap&, const TensorMap&, const GemmArgs&) {}
#endif

#define STREAM_KERNEL(name, ROWS, TILE)                                                                                             \
  KERNEL __launch_bounds__(TILE == 64 ? 160 : 288) name(                                                                            \
      const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const __grid_constant__ GemmArgs args) { \
    stream_gemm<ROWS, TILE>(w_map, x_map, args);                                                                            \
  }
STREAM_KERNEL(stream_gemm_rows8_tile64, 8, 64)
STREAM_KERNEL(stream_gemm_rows8_tile128, 8, 128)
STREAM_KERNEL(stream_gemm_rows8_tile256, 8, 256)
STREAM_KERNEL(stream_gemm_rows16_tile64, 16, 64)
STREAM_KERNEL(stream_gemm_rows16_tile128, 16, 128)
STREAM_KERNEL(stream_gemm_rows16_tile256, 16, 256)
STREAM_KERNEL(stream_gemm_rows32_tile64, 32, 64)
STREAM_KERNEL(stream_gemm_rows32_tile128, 32, 128)
STREAM_KERNEL(stream_gemm_rows32_tile256, 32, 256)
STREAM_KERNEL(stream_gemm_rows64_tile64, 64, 64)
STREAM_KERNEL(stream_gemm_rows64_tile128, 64, 128)
STREAM_KERNEL(stream_gemm_rows64_tile256, 64, 256)
STREAM_KERNEL(stream_gemm_rows128_tile64, 128, 64)
STREAM_KERNEL(stream_gemm_rows128_tile128, 128, 128)
STREAM_KERNEL(stream_gemm_rows128_tile256, 128, 256)
