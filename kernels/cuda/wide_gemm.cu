// wide_gemm.cu   y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias), overwriting or added to   bf16 in, f32 sums, bf16 or f32 out; Hopper (sm_90a) alone
// Shapes  x [m, k]; w [n, k]; bias [n] in y's dtype or null; y [m, n]. Gated: y [m, n / 2] = act(x · w[..n / 2]ᵀ) · (x · w[n / 2..]ᵀ), both
//         rounded to bf16 before as where activation.cu does it; bf16 out, without bias
// Layout  row-major; x and w by tensor maps: boxes of 64 columns with the 128-byte swizzle, of TILE rows of w (gated: of half as many, of gate and
//         of up) and of 64·PARTS rows of x
// Launch  grid (splits · sharing, ceil(n / (TILE · sharing))), clusters of a grid row; block 288, or 256 from PARTS · TILE = 384 on; dynamic
//         shared `stages` tiles of w and `x_stages` of x, plus 1024 bytes
// Cost    flops 2·m·n·k; bytes 2·n·k, and x from L2 for each block, or for each two where they share: at 256 rows the tensor cores, L2 and memory
//         all have nearly the same time to take, so that what is saved is a second wave of blocks and x's way from L2
// Limits  k % 8 == 0; n % 8 == 0 (gated: 16, one split); m <= 128·PARTS; sharing 1 or 2; splits · sharing <= 8; where splits > 1, rings that hold
//         a tile's sums (128·PARTS · (TILE + 8) f32)
// Method  x is the left operand: two warpgroups have PARTS times 64 rows each, against TILE rows of w, so that tiles can be as wide as makes one
//         wave of n. Two blocks of neighbouring tiles may share x: each copies half of it to both. The rest is stream_gemm.cu's: a ring of stages
//         filled by the bulk copy engine, w asked for before the kernel before this one has ended, splits of k added in one cluster, in their
//         order
#include "hopper.cuh"

struct __align__(8) WideArgs {
  GemmArgs gemm;
  int num_sharing;   // blocks that share x
  int num_x_stages;  // no more than those of w
  int gate;          // 0: silu; 1: gelu by tanh
};

// A warp of its own copies, unless the sums leave registers for two warpgroups alone: then a thread of the first does.
#define HAS_COPIER_WARP(PARTS, TILE) (PARTS * TILE < 384)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
static constexpr int CONSUMERS = 256;

// As `copy_box`, to the same place in every block of the cluster that `blocks` has a bit for, each one's barrier told.
DEVICE void copy_box_to(uint16_t blocks, void* shared, const TensorMap* map, uint64_t* barrier, int column, int row, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], "
      "%5, %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks), "l"(hint)
      : "memory");
}
DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_cluster(shared_address(barrier), rank)) : "memory");
}
DEVICE void consumers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// Four neighbouring columns of a row for each lane, out of the pairs that it and its neighbour have of two groups of 8 columns: an even lane gets
// those of the first group, an odd one those of the second, from the column of the even lane on.
DEVICE float4 gather_4(float first0, float first1, float second0, float second1, bool is_odd) {
  const float other0 = __shfl_xor_sync(0xffffffffu, is_odd ? first0 : second0, 1);
  const float other1 = __shfl_xor_sync(0xffffffffu, is_odd ? first1 : second1, 1);
  return is_odd ? make_float4(other0, other1, second0, second1) : make_float4(first0, first1, other0, other1);
}

DEVICE void put_or_add(const GemmArgs& args, int64_t row, int column, float4 sum) {
  put(args, row, column, sum, args.output == 2 ? load_old(args, row, column) : make_float4(0.f, 0.f, 0.f, 0.f));
}

// act(gate) · up of two neighbours, as from bf16.
DEVICE float2 gated(int gate, float gate0, float gate1, float up0, float up1) {
  const uint32_t gates = pack_bf16(gate0, gate1), ups = pack_bf16(up0, up1);
  const float g0 = low_bf16(gates), g1 = high_bf16(gates);
  return gate == 0 ? make_float2(silu(g0) * low_bf16(ups), silu(g1) * high_bf16(ups))
                   : make_float2(gelu_tanh(g0) * low_bf16(ups), gelu_tanh(g1) * high_bf16(ups));
}

template <int PARTS, int TILE, bool GATED>
DEVICE void wide_gemm(const TensorMap& w_map, const TensorMap& x_map, const WideArgs& wide) {
  constexpr bool HAS_COPIER = HAS_COPIER_WARP(PARTS, TILE), MAY_SPLIT = PARTS * TILE < 448 && !GATED;  // where the rings hold the sums
  constexpr int COLUMNS = GATED ? TILE / 2 : TILE;  // of y
  constexpr int W_BYTES = TILE * DEPTH * 2, HALF_X_BYTES = PARTS * 64 * DEPTH * 2;
  constexpr int STRIDE = TILE + 8;  // of the sums in shared memory: four neighbouring rows lie 8 banks apart
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
  unsigned char* stages = dynamic_shared + (1024 - (shared_address(dynamic_shared) & 1023)) % 1024;
  const GemmArgs& args = wide.gemm;  // gated: n is y's
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_splits = MAY_SPLIT ? args.num_splits : 1, num_sharing = wide.num_sharing;
  // blockIdx.x is the rank in the cluster: those that share x are neighbours.
  const int split = blockIdx.x / num_sharing, member = blockIdx.x % num_sharing;
  const int column0 = (blockIdx.y * num_sharing + member) * COLUMNS;
  const int all_steps = (args.k + DEPTH - 1) / DEPTH;
  const int first = all_steps * split / num_splits;
  const int num_steps = all_steps * (split + 1) / num_splits - first;
  // Rings of their own for w, which comes from memory, and x, which comes from L2; a step's barriers are those of its place in the longer one.
  const int num_stages = args.num_stages, num_x_stages = wide.num_x_stages;
  unsigned char *w_ring = stages, *x_ring = stages + num_stages * W_BYTES;
  const bool in_cluster = num_splits * num_sharing > 1;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < num_stages; stage++) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], CONSUMERS / 32 * num_sharing);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  auto load_w = [&](int stage, int step) {
    barrier_expect(&full[stage], W_BYTES + 2 * HALF_X_BYTES);
    unsigned char* w = w_ring + stage * W_BYTES;
    const int column = (first + step) * DEPTH;
    copy_box(w, &w_map, &full[stage], column, column0, EVICT_FIRST);
    if (GATED) copy_box(w + W_BYTES / 2, &w_map, &full[stage], column, args.n + column0, EVICT_FIRST);
  };
  auto load_x = [&](int stage, int x_stage, int step) {
    unsigned char* x = x_ring + x_stage * 2 * HALF_X_BYTES;
    const int column = (first + step) * DEPTH;
    if (num_sharing == 2) {
      copy_box_to(3 << (2 * split), x + member * HALF_X_BYTES, &x_map, &full[stage], column, member * PARTS * 64, EVICT_LAST);
    } else {
      copy_box(x, &x_map, &full[stage], column, 0, EVICT_LAST);
      copy_box(x + HALF_X_BYTES, &x_map, &full[stage], column, PARTS * 64, EVICT_LAST);
    }
  };
  // What a step leaves room for once it is done: w of a step a ring later, and x.
  auto refill = [&](int step, int stage, int x_stage, int parity) {
    if (step + num_x_stages >= num_steps) return;
    barrier_wait(&empty[stage], parity);
    if (step + num_stages < num_steps) load_w(stage, step + num_stages);
    const int x_step_stage = stage + num_x_stages;
    load_x(x_step_stage < num_stages ? x_step_stage : x_step_stage - num_stages, x_stage, step + num_x_stages);
  };
  const bool copies = threadIdx.x == (HAS_COPIER ? CONSUMERS : 0);
  if (copies) {
    for (int step = 0; step < min(num_stages, num_steps); step++) load_w(step, step);
  }
  __syncwarp();
  // The other blocks' barriers are ready for what is copied there.
  if (in_cluster) cluster_barrier();
  if (copies) {
    wait_for_previous_kernel();
    // Not before: x is complete when the next kernel starts, see `x_is_ready` of lora_shrink.cu.
    allow_next_kernel();
    for (int step = 0; step < min(num_x_stages, num_steps); step++) load_x(step, step, step);
  }
  __syncwarp();

  if (HAS_COPIER && warp == CONSUMERS / 32) {
    if (copies) {
      int stage = 0, x_stage = 0, parity = 0;
      for (int step = 0; step < num_steps; step++) {
        refill(step, stage, x_stage, parity);
        if (++x_stage == num_x_stages) x_stage = 0;
        advance(stage, parity, num_stages);
      }
    }
    __syncwarp();
    wait_for_previous_kernel();
    if (num_splits > 1) cluster_barrier();
  } else {
    float acc[PARTS][TILE / 2] = {};
    const int warpgroup = warp / 4;
    int stage = 0, x_stage = 0, parity = 0, last = 0, last_x = 0, last_parity = 0;
#pragma unroll 1
    for (int step = 0; step < num_steps; step++) {
      barrier_wait(&full[stage], parity);
      const uint64_t w = matrix_descriptor(w_ring + stage * W_BYTES);
      const unsigned char* x_tile = x_ring + (2 * x_stage + warpgroup) * HALF_X_BYTES;
      warpgroup_begin();
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const uint64_t x = matrix_descriptor(x_tile + part * 64 * DEPTH * 2);
        // 16 columns are 32 bytes, in units of 16.
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) warpgroup_mma(acc[part], x + 2 * i, w + 2 * i);
      }
      warpgroup_commit();
      // The step before is done: its stages may be filled again.
      warpgroup_wait<1>();
      if (step > 0) {
        if (lane < num_sharing) {
          if (num_sharing == 1) {
            barrier_arrive(&empty[last]);
          } else {
            barrier_arrive_at(&empty[last], 2 * split + lane);
          }
        }
        if (!HAS_COPIER) {
          if (copies) refill(step - 1, last, last_x, last_parity);
          __syncwarp();
        }
      }
      last = stage;
      last_x = x_stage;
      last_parity = parity;
      if (++x_stage == num_x_stages) x_stage = 0;
      advance(stage, parity, num_stages);
    }
    warpgroup_wait<0>();
    wait_for_previous_kernel();
    const int g = lane / 4, t = lane % 4;
    if (!MAY_SPLIT || num_splits == 1) {
      const bool is_odd = lane % 2 == 1;
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int row = (warpgroup * PARTS + part) * 64 + warp % 4 * 16 + g;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 2) {
          float* d = &acc[part][4 * j];
          if (GATED) {
            const float* up = d + TILE / 4;
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
              const float2 y = gated(wide.gate, d[i], d[i + 1], up[i], up[i + 1]);
              d[i] = y.x;
              d[i + 1] = y.y;
            }
          }
          const int column = column0 + (j + is_odd) * 8 + t / 2 * 4;
          const float4 upper = gather_4(d[0], d[1], d[4], d[5], is_odd), lower = gather_4(d[2], d[3], d[6], d[7], is_odd);
          if (column < args.n) {
            if (row < args.m) put_or_add(args, row, column, upper);
            if (row + 8 < args.m) put_or_add(args, row + 8, column, lower);
          }
        }
      }
    } else {
      // Every stage has been read once all have come here.
      consumers_barrier();
      float* sums = reinterpret_cast<float*>(stages);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int row = (warpgroup * PARTS + part) * 64 + warp % 4 * 16 + g;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
          float* to = sums + row * STRIDE + 8 * j + 2 * t;
          *reinterpret_cast<float2*>(to) = make_float2(acc[part][4 * j], acc[part][4 * j + 1]);
          *reinterpret_cast<float2*>(to + 8 * STRIDE) = make_float2(acc[part][4 * j + 2], acc[part][4 * j + 3]);
        }
      }
      // Every block of a tile writes its rows of the sum.
      put_sums<128 * PARTS, TILE, STRIDE, CONSUMERS>(args, sums, split, num_splits, member, num_sharing, column0, [] {
        __syncwarp();
        cluster_barrier();
      });
    }
    __syncwarp();
  }
  // No block leaves while another one reads its sums, frees its stages or copies to them.
  if (in_cluster) cluster_barrier();
}
#else
// Elsewhere the launcher does not take it.
template <int PARTS, int TILE, bool GATED>
DEVICE void wide_gemm(const TensorMap&, const TensorMap&, const WideArgs&) {}
#endif

#define WIDE_KERNEL(name, PARTS, TILE, GATED)                                                                                            \
  KERNEL __launch_bounds__(HAS_COPIER_WARP(PARTS, TILE) ? 288 : 256, 1) name(                                                              \
      const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const __grid_constant__ WideArgs args) { \
    wide_gemm<PARTS, TILE, GATED>(w_map, x_map, args);                                                                           \
  }
WIDE_KERNEL(wide_gemm_rows128_tile64, 1, 64, false)
WIDE_KERNEL(wide_gemm_rows128_tile96, 1, 96, false)
WIDE_KERNEL(wide_gemm_rows128_tile128, 1, 128, false)
WIDE_KERNEL(wide_gemm_rows128_tile192, 1, 192, false)
WIDE_KERNEL(wide_gemm_rows128_tile224, 1, 224, false)
WIDE_KERNEL(wide_gemm_rows256_tile64, 2, 64, false)
WIDE_KERNEL(wide_gemm_rows256_tile96, 2, 96, false)
WIDE_KERNEL(wide_gemm_rows256_tile128, 2, 128, false)
WIDE_KERNEL(wide_gemm_rows256_tile192, 2, 192, false)
WIDE_KERNEL(wide_gemm_rows256_tile224, 2, 224, false)
WIDE_KERNEL(wide_gemm_rows128_tile224_gated, 1, 224, true)
WIDE_KERNEL(wide_gemm_rows256_tile224_gated, 2, 224, true)
