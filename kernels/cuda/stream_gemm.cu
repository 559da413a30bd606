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
#include "common.cuh"

struct __align__(64) TensorMap {
  uint64_t words[16];
};

struct StreamArgs {
  void* y;
  const void* bias;
  int m;
  int n;
  int k;
  int output;  // 0: bf16; 1: f32; 2: added to f32
  int num_splits;
  int num_stages;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
static constexpr int DEPTH = 64;  // columns of a stage
static constexpr int MAX_STAGES = 16;

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
DEVICE void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint64_t* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"); }
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Hints for the L2 cache: what is read once goes first, what every block reads stays.
static constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;
static constexpr uint64_t EVICT_LAST = 0x14F0000000000000;

DEVICE void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "l"(hint)
      : "memory");
}
// Rows of 128 bytes in groups of 8, swizzled by 128 bytes.
DEVICE uint64_t matrix_descriptor(const void* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// d += a · bᵀ with a [64, 16] and b [2·size(d), 16] in shared memory.
DEVICE void warpgroup_mma(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3"
      "}, %4, %5, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[8], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7"
      "}, %8, %9, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "l"(a), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
      "}, %16, %17, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
      "}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),
        "+f"(d[31])
      : "l"(a), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
      "}, %64, %65, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
        "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),
        "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b));
}

DEVICE float4 load_4_in_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

// Four neighbouring outputs of a row.
DEVICE void put(const StreamArgs& args, int64_t row, int column, float4 sum) {
  if (args.output == 0) {
    if (args.bias != nullptr) {
      const uint2 bias = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(args.bias) + column);
      sum.x += low_bf16(bias.x);
      sum.y += high_bf16(bias.x);
      sum.z += low_bf16(bias.y);
      sum.w += high_bf16(bias.y);
    }
    *reinterpret_cast<uint2*>(static_cast<bf16*>(args.y) + row * args.n + column) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    return;
  }
  float4* to = reinterpret_cast<float4*>(static_cast<float*>(args.y) + row * args.n + column);
  if (args.bias != nullptr) {
    const float4 bias = *reinterpret_cast<const float4*>(static_cast<const float*>(args.bias) + column);
    sum.x += bias.x;
    sum.y += bias.y;
    sum.z += bias.z;
    sum.w += bias.w;
  }
  if (args.output == 2) {
    const float4 old = *to;
    sum.x += old.x;
    sum.y += old.y;
    sum.z += old.z;
    sum.w += old.w;
  }
  *to = sum;
}

template <int ROWS, int TILE>
DEVICE void stream_gemm(const TensorMap& w_map, const TensorMap& x_map, const StreamArgs& args) {
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
        if (++stage == args.num_stages) {
          stage = 0;
          parity ^= 1;
        }
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
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const uint64_t w = matrix_descriptor(w_tile + part * 64 * DEPTH * 2);
        // 16 columns are 32 bytes, in units of 16.
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) warpgroup_mma(acc[part], w + 2 * i, x + 2 * i);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The step before is done: its stage may be filled again.
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (step > 0 && lane == 0) barrier_arrive(&empty[last]);
      last = stage;
      if (++stage == args.num_stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
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
  if (num_splits > 1) cluster_barrier();
  const uint32_t sums = shared_address(stages);
  constexpr int VECTORS = TILE / 4;
  for (int i = threadIdx.x;; i += THREADS) {
    const int row = i / VECTORS * num_splits + split, column = i % VECTORS * 4;
    if (row >= args.m) break;
    if (column0 + column >= args.n) continue;
    const uint32_t from = sums + (row * STRIDE + column) * 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (num_splits == 1) {
      sum = load_4_in_cluster(from);
    } else {
      for (int other = 0; other < num_splits; other++) {
        const float4 part = load_4_in_cluster(address_in_cluster(from, other));
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
    }
    put(args, row, column0 + column, sum);
  }
  // No block leaves while another one reads its sums.
  if (num_splits > 1) {
    __syncwarp();
    cluster_barrier();
  }
}
#else
// Elsewhere the launcher does not take it.
template <int ROWS, int TILE>
DEVICE void stream_gemm(const TensorMap&, const TensorMap&, const StreamArgs&) {}
#endif

#define STREAM_KERNEL(name, ROWS, TILE)                                                                                             \
  KERNEL __launch_bounds__(TILE == 64 ? 160 : 288) name(                                                                            \
      const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const __grid_constant__ StreamArgs args) { \
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
