// hopper.cuh   What GEMMs of our own on Hopper (sm_90a) share: tensor maps, barriers of the bulk copy engine, warpgroup instructions, outputs.
#pragma once
#include "common.cuh"

struct __align__(64) TensorMap {
  uint64_t words[16];
};

// Arguments of a GEMM: y [m, n] = x [m, k] · w [n, k]ᵀ (+ bias).
struct GemmArgs {
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

// The next place in a ring, and the parity of its barriers' round.
DEVICE void advance(int& stage, int& parity, int num_stages) {
  if (++stage == num_stages) {
    stage = 0;
    parity ^= 1;
  }
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

// d += a · bᵀ with a [64, 16] and b [2·size(d), 16] in shared memory. d[4j..]: rows g and g + 8 of the warp's 16, columns 8j + 2t and the next, as
// (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 16), SUMS_16(i + 32), SUMS_16(i + 48)
#define PLACES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PLACES_1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PLACES_2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PLACES_3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PLACES_4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define PLACES_5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PLACES_6 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define PLACES_7 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WARPGROUP_MMA(n, places, a_place, b_place, ...)                                                                        \
  DEVICE void warpgroup_mma(float (&d)[n / 2], uint64_t a, uint64_t b) {                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" places "}, " a_place ", " b_place ", 1, 1, 1, 0, 0;" \
                 : __VA_ARGS__                                                                                                 \
                 : "l"(a), "l"(b));                                                                                            \
  }
#define PLACES_0_TO_3 PLACES_0 "," PLACES_1 "," PLACES_2 "," PLACES_3
#define PLACES_4_TO_5 PLACES_4 "," PLACES_5
WARPGROUP_MMA(8, "%0,%1,%2,%3", "%4", "%5", SUMS_4(0))
WARPGROUP_MMA(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", SUMS_4(0), SUMS_4(4))
WARPGROUP_MMA(32, PLACES_0, "%16", "%17", SUMS_16(0))
WARPGROUP_MMA(64, PLACES_0 "," PLACES_1, "%32", "%33", SUMS_16(0), SUMS_16(16))
WARPGROUP_MMA(96, PLACES_0 "," PLACES_1 "," PLACES_2, "%48", "%49", SUMS_16(0), SUMS_16(16), SUMS_16(32))
WARPGROUP_MMA(128, PLACES_0_TO_3, "%64", "%65", SUMS_64(0))
WARPGROUP_MMA(192, PLACES_0_TO_3 "," PLACES_4_TO_5, "%96", "%97", SUMS_64(0), SUMS_16(64), SUMS_16(80))
WARPGROUP_MMA(224, PLACES_0_TO_3 "," PLACES_4_TO_5 "," PLACES_6, "%112", "%113", SUMS_64(0), SUMS_16(64), SUMS_16(80), SUMS_16(96))
WARPGROUP_MMA(256, PLACES_0_TO_3 "," PLACES_4_TO_5 "," PLACES_6 "," PLACES_7, "%128", "%129", SUMS_64(0), SUMS_64(64))
// Before a step's instructions, after them, and until at most `pending` steps' are unfinished.
DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

DEVICE float4 load_4_in_cluster(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}
DEVICE void add_4(float4& sum, float4 v) {
  sum.x += v.x;
  sum.y += v.y;
  sum.z += v.z;
  sum.w += v.w;
}

// Four neighbouring outputs of a row; `old` is what they are added to, where they are.
DEVICE float4 load_old(const GemmArgs& args, int64_t row, int column) {
  return *reinterpret_cast<const float4*>(static_cast<const float*>(args.y) + row * args.n + column);
}
DEVICE void put(const GemmArgs& args, int64_t row, int column, float4 sum, float4 old) {
  if (args.output == 0) {
    if (args.bias != nullptr) {
      const uint2 bias = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(args.bias) + column);
      add_4(sum, make_float4(low_bf16(bias.x), high_bf16(bias.x), low_bf16(bias.y), high_bf16(bias.y)));
    }
    *reinterpret_cast<uint2*>(static_cast<bf16*>(args.y) + row * args.n + column) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    return;
  }
  if (args.bias != nullptr) add_4(sum, *reinterpret_cast<const float4*>(static_cast<const float*>(args.bias) + column));
  if (args.output == 2) add_4(sum, old);
  *reinterpret_cast<float4*>(static_cast<float*>(args.y) + row * args.n + column) = sum;
}

// The end of a tile: threads 0 to THREADS - 1 put the rows of it that are this block's, each the sum of what `num_splits` blocks of the cluster have
// at `sums` [rows, STRIDE], in their order: the first is `first_rank`, the others follow `rank_step` apart. `ready` comes between asking for what
// the sums are added to and reading them: all blocks' sums are there after it. Up to four vectors of a thread at once, as each comes from afar, where
// two splits of ROWS rows have so many for it.
template <int ROWS, int TILE, int STRIDE, int THREADS, typename Ready>
DEVICE void put_sums(const GemmArgs& args, const float* sums, int split, int num_splits, int first_rank, int rank_step, int column0, Ready ready) {
  constexpr int VECTORS = TILE / 4, OF_A_THREAD = (ROWS * VECTORS / 2 + THREADS - 1) / THREADS, AT_ONCE = OF_A_THREAD < 4 ? OF_A_THREAD : 4;
  bool is_ready = false;
  for (int i0 = threadIdx.x;; i0 += THREADS * AT_ONCE) {
    float4 sum[AT_ONCE], old[AT_ONCE];
    uint32_t from[AT_ONCE];
    int row[AT_ONCE], column[AT_ONCE];
    bool is_output[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int i = i0 + j * THREADS;
      row[j] = i / VECTORS * num_splits + split;
      column[j] = i % VECTORS * 4;
      is_output[j] = row[j] < args.m && column0 + column[j] < args.n;
      from[j] = shared_address(sums + row[j] * STRIDE + column[j]);
      sum[j] = old[j] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (is_output[j] && args.output == 2) old[j] = load_old(args, row[j], column0 + column[j]);
    }
    if (!is_ready) ready();
    is_ready = true;
    if (row[0] >= args.m) break;
#pragma unroll 2
    for (int other = 0; other < num_splits; other++) {
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        if (is_output[j]) add_4(sum[j], load_4_in_cluster(address_in_cluster(from[j], first_rank + other * rank_step)));
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (is_output[j]) put(args, row[j], column0 + column[j], sum[j], old[j]);
    }
  }
}
#endif
