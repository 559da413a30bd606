// attention_prefill.cu   causal attention of a chunk's query rows over the paged cache (which already holds the chunk's own K and V)
//                        Source: arXiv:2307.08691 (FlashAttention-2), pages arXiv:2309.06180
// Shapes  q [T, q_stride] bf16 (head h at h·D); k, v [num_blocks, KV, block_size, D] bf16, blocks block_stride apart; tiles [num_tiles]: neighbouring rows of one
//         sequence, at most floor(M / (H/KV)) of them, M = 128 or (D = 256) 64; out [T, H·D] bf16
// Layout  a block's M score rows are (row, head) pairs of one K/V head's group, so that K and V are read once for the whole group
// Launch  grid (num_tiles, KV), block 128 (4 warps of M/4 score rows), dynamic shared q and 2 stages of a K and a V tile, rows padded by 16 bytes
// Cost    flops 4·H·D·Σ visible positions; bytes through L2 4·KV·D per visible position and tile: the tensor cores are the roof
// Limits  D in {64, 96, 128, 256}; H/KV <= 64; block_size a power of two
// Variants tiles of 64 positions; of 32 where shared memory is short (D = 128 on sm_86, sm_89) or registers are (D = 256)
#include "common.cuh"

// Rows [row_start, row_start + num_rows) of one sequence, the first of them at `position`; its blocks start at block_tables[block_table_start].
struct PrefillTile {
  uint32_t row_start;
  uint32_t num_rows;
  uint32_t position;
  uint32_t block_table_start;
};

struct PrefillArgs {
  bf16* out;
  const bf16* q;
  const bf16* k;
  const bf16* v;
  const PrefillTile* tiles;
  const uint32_t* block_tables;
  int64_t block_stride;  // elements from one block of k (and of v) to the next
  int q_stride;
  int num_heads;
  int num_kv_heads;
  int block_shift;  // log2 of the positions of a block
  int window;  // 0: none
  float scale;
};

// N positions of K and of V, to neighbouring tiles of shared memory. A thread has one 16-byte column and every (THREADS / CHUNKS)th position.
template <int D, int N, int THREADS>
DEVICE void load_tiles(bf16* keys, const uint32_t* block_table, const PrefillArgs& p, int kv_head, int from, int end) {
  constexpr int CHUNKS = D / 8, ROWS = THREADS / CHUNKS, STRIDE = D + 8;
  static_assert(THREADS % CHUNKS == 0 || D == 96, "whole rows of threads");
  const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
  if (first >= ROWS) return;  // D = 96: 12 columns do not divide 128 threads
#pragma unroll
  for (int row = first; row < N; row += ROWS) {
    const bool valid = from + row < end;
    const int position = valid ? from + row : from;
    const uint32_t block = block_table[position >> p.block_shift];
    const int64_t offset = block * p.block_stride + ((kv_head << p.block_shift) + (position & ((1 << p.block_shift) - 1))) * D + chunk * 8;
    copy_async_16(keys + row * STRIDE + chunk * 8, p.k + offset, valid);
    copy_async_16(keys + (N + row) * STRIDE + chunk * 8, p.v + offset, valid);
  }
}

// A warp has TILES times 16 score rows: each K and V fragment that it reads from shared memory serves all of them.
template <int D, int N, int WARPS, int TILES>
DEVICE void prefill(const PrefillArgs& p) {
  constexpr int STRIDE = D + 8, THREADS = 32 * WARPS, M = WARPS * TILES * 16;
  DYNAMIC_SHARED(bf16, shared);  // q [M][STRIDE], then [stage][K, V][N][STRIDE]
  bf16* stages = shared + M * STRIDE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.y;
  const int group = p.num_heads / p.num_kv_heads;
  const PrefillTile tile = p.tiles[gridDim.x - 1 - blockIdx.x];  // a sequence's last tiles see most positions: they start first
  const uint32_t* block_table = p.block_tables + tile.block_table_start;
  const int end = (int)(tile.position + tile.num_rows);
  int begin = 0;
  if (p.window > 0 && (int)tile.position + 1 > p.window) begin = (((int)tile.position + 1 - p.window) / N) * N;
  allow_next_kernel();
  wait_for_previous_kernel();

  // Score row r is query row r / group, head r % group.
  for (int i = threadIdx.x; i < M * (D / 8); i += THREADS) {
    const int r = i / (D / 8), chunk = i % (D / 8), row = r / group;
    const bool valid = row < (int)tile.num_rows;
    const bf16* from = p.q + (int64_t)(tile.row_start + (valid ? row : 0)) * p.q_stride + (int64_t)(kv_head * group + r % group) * D + chunk * 8;
    copy_async_16(shared + r * STRIDE + chunk * 8, from, valid);
  }
  load_tiles<D, N, THREADS>(stages, block_table, p, kv_head, begin, end);
  copy_async_commit();

  int row_position[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) row_position[m][half] = (int)tile.position + (warp * TILES * 16 + m * 16 + half * 8 + g) / group;
  }
  const int first_position = (int)tile.position + warp * TILES * 16 / group;
  const int last_position = (int)tile.position + (warp * TILES * 16 + TILES * 16 - 1) / group;
  const bool has_rows = first_position < end;
  const float scale_log2 = p.scale * 1.4426950408889634f;
  float row_max[TILES][2], row_sum[TILES][2] = {};
#pragma unroll
  for (int m = 0; m < TILES; m++) row_max[m][0] = row_max[m][1] = -INFINITY;
  float o[TILES][D / 8][4] = {};

  int stage = 0;
  for (int from = begin; from < end; from += N, stage ^= 1) {
    bf16* keys = stages + stage * 2 * N * STRIDE;
    bf16* values = keys + N * STRIDE;
    if (from + N < end) {
      load_tiles<D, N, THREADS>(stages + (stage ^ 1) * 2 * N * STRIDE, block_table, p, kv_head, from + N, end);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();

    // Of no row of this warp: after all of them, or before the window of the first.
    if (has_rows && from <= last_position && !(p.window > 0 && from + N + p.window <= first_position + 1)) {
      float s[TILES][N / 8][4] = {};
#pragma unroll
      for (int c = 0; c < D / 16; c++) {
        uint32_t q[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
          ldmatrix_x4(q[m], shared + (warp * TILES * 16 + m * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE + c * 16 + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
          // Matrices: positions 0-7 and 8-15 of the 16, each with the two halves of 16 values of d.
          uint32_t b[4];
          ldmatrix_x4(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * STRIDE + c * 16 + lane / 8 % 2 * 8);
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            mma_bf16(s[m][2 * n], q[m][0], q[m][1], q[m][2], q[m][3], b[0], b[1]);
            mma_bf16(s[m][2 * n + 1], q[m][0], q[m][1], q[m][2], q[m][3], b[2], b[3]);
          }
        }
      }
      const bool masked = from + N > first_position + 1 || (p.window > 0 && from + p.window <= last_position);
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float peak = row_max[m][half];
#pragma unroll
          for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              float x = s[m][n][2 * half + i];
              if (masked) {
                const int at = from + n * 8 + 2 * t + i;
                if (at > row_position[m][half] || (p.window > 0 && at + p.window <= row_position[m][half])) x = -INFINITY;
                s[m][n][2 * half + i] = x;
              }
              peak = fmaxf(peak, x);
            }
          }
          peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
          peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
          const float reference = peak == -INFINITY ? 0.f : peak * scale_log2;
          const float keep = exp2_fast(row_max[m][half] * scale_log2 - reference);
          row_max[m][half] = peak;
          float sum = 0.f;
#pragma unroll
          for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const float weight = exp2_fast(s[m][n][2 * half + i] * scale_log2 - reference);
              s[m][n][2 * half + i] = weight;
              sum += weight;
            }
          }
          row_sum[m][half] = row_sum[m][half] * keep + sum;
#pragma unroll
          for (int n = 0; n < D / 8; n++) {
            o[m][n][2 * half] *= keep;
            o[m][n][2 * half + 1] *= keep;
          }
        }
      }
#pragma unroll
      for (int c = 0; c < N / 16; c++) {
        uint32_t a[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          a[m][0] = pack_bf16(s[m][2 * c][0], s[m][2 * c][1]);
          a[m][1] = pack_bf16(s[m][2 * c][2], s[m][2 * c][3]);
          a[m][2] = pack_bf16(s[m][2 * c + 1][0], s[m][2 * c + 1][1]);
          a[m][3] = pack_bf16(s[m][2 * c + 1][2], s[m][2 * c + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
          // Matrices: 16 positions as two halves, each with columns 0-7 and 8-15 of the 16, transposed.
          uint32_t b[4];
          ldmatrix_x4_trans(b, values + (c * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE + n * 16 + lane / 16 * 8);
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            mma_bf16(o[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
            mma_bf16(o[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
          }
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < TILES; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int r = warp * TILES * 16 + m * 16 + half * 8 + g, row = r / group;
      if (row >= (int)tile.num_rows) continue;
      bf16* to = p.out + ((int64_t)(tile.row_start + row) * p.num_heads + kv_head * group + r % group) * D;
      const float inverse = 1.f / sum;
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        *reinterpret_cast<uint32_t*>(to + n * 8 + 2 * t) = pack_bf16(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
    }
  }
}

#define PREFILL_KERNEL(name, D, N, WARPS, TILES) \
  KERNEL __launch_bounds__(32 * WARPS) name(const __grid_constant__ PrefillArgs args) { prefill<D, N, WARPS, TILES>(args); }
PREFILL_KERNEL(attention_prefill_d64, 64, 64, 4, 2)
PREFILL_KERNEL(attention_prefill_d96, 96, 64, 4, 2)
PREFILL_KERNEL(attention_prefill_d128, 128, 64, 4, 2)
PREFILL_KERNEL(attention_prefill_d128_small, 128, 32, 4, 2)
PREFILL_KERNEL(attention_prefill_d256, 256, 32, 4, 1)
