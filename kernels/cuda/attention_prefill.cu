// attention_prefill.cu   causal attention of a chunk's query rows over the paged cache (which already holds the chunk's own K and V)
//                        Source: arXiv:2307.08691 (FlashAttention-2), pages arXiv:2309.06180
// Shapes  q [T, q_stride] bf16 (head h at h·D); k, v [num_blocks, KV, block_size, D] bf16; tiles [num_tiles]: neighbouring rows of one
//         sequence, at most floor(128 / (H/KV)) of them; out [T, H·D] bf16
// Layout  a block's 128 score rows are (row, head) pairs of one K/V head's group, so that K and V are read once for the whole group
// Launch  grid (num_tiles, KV), block 256 (8 warps of 16 score rows), shared 2 stages of a K and a V tile, rows padded by 16 bytes
// Cost    flops 4·H·D·Σ visible positions; bytes through L2 4·KV·D per visible position and tile: the tensor cores are the roof
// Limits  D in {64, 96, 128, 256}; H/KV <= 128; block_size % 8 == 0
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
  int q_stride;
  int num_heads;
  int num_kv_heads;
  int block_size;
  int window;  // 0: none
  float scale;
};

template <int D, int N>
DEVICE void load_tile(bf16* shared, const bf16* cache, const uint32_t* block_table, const PrefillArgs& p, int kv_head, int from, int end) {
  constexpr int CHUNKS = D / 8;
  for (int i = threadIdx.x; i < N * CHUNKS; i += 256) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const int position = from + row;
    const bool valid = position < end;
    const uint32_t block = block_table[(valid ? position : from) / p.block_size];
    const bf16* source = cache + (((int64_t)block * p.num_kv_heads + kv_head) * p.block_size + (valid ? position : from) % p.block_size) * D + chunk * 8;
    copy_async_16(shared + row * (D + 8) + chunk * 8, source, valid);
  }
}

template <int D, int N>
DEVICE void prefill(const PrefillArgs& p) {
  constexpr int STRIDE = D + 8;
  DYNAMIC_SHARED(bf16, shared);  // [stage][K, V][N][STRIDE]
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

  load_tile<D, N>(shared, p.k, block_table, p, kv_head, begin, end);
  load_tile<D, N>(shared + N * STRIDE, p.v, block_table, p, kv_head, begin, end);
  copy_async_commit();

  // Score rows g and g+8 of the warp: query row r / group, head r % group.
  uint32_t q[D / 16][4];
  int row_position[2];
  int64_t row_offset[2];
  bool row_valid[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = warp * 16 + half * 8 + g;
    const int row = r / group;
    row_valid[half] = row < (int)tile.num_rows;
    row_position[half] = (int)tile.position + row;
    row_offset[half] = (int64_t)(tile.row_start + row);
    const bf16* from = p.q + row_offset[half] * p.q_stride + (int64_t)(kv_head * group + r % group) * D;
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
      q[c][half] = row_valid[half] ? *reinterpret_cast<const uint32_t*>(from + c * 16 + 2 * t) : 0;
      q[c][half + 2] = row_valid[half] ? *reinterpret_cast<const uint32_t*>(from + c * 16 + 8 + 2 * t) : 0;
    }
  }
  const float scale_log2 = p.scale * 1.4426950408889634f;
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  float o[D / 8][4] = {};

  int stage = 0;
  for (int from = begin; from < end; from += N, stage ^= 1) {
    bf16* keys = shared + stage * 2 * N * STRIDE;
    bf16* values = keys + N * STRIDE;
    if (from + N < end) {
      bf16* next = shared + (stage ^ 1) * 2 * N * STRIDE;
      load_tile<D, N>(next, p.k, block_table, p, kv_head, from + N, end);
      load_tile<D, N>(next + N * STRIDE, p.v, block_table, p, kv_head, from + N, end);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();

    float s[N / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
#pragma unroll
      for (int n = 0; n < N / 16; n++) {
        // Matrices: positions 0-7 and 8-15 of the 16, each with the two halves of 16 values of d.
        uint32_t b[4];
        ldmatrix_x4(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * STRIDE + c * 16 + lane / 8 % 2 * 8);
        mma_bf16(s[2 * n], q[c][0], q[c][1], q[c][2], q[c][3], b[0], b[1]);
        mma_bf16(s[2 * n + 1], q[c][0], q[c][1], q[c][2], q[c][3], b[2], b[3]);
      }
    }
    const bool masked = from + N > (int)tile.position + 1 || (p.window > 0 && from + p.window < end);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float peak = row_max[half];
#pragma unroll
      for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float x = s[n][2 * half + i] * scale_log2;
          if (masked) {
            const int at = from + n * 8 + 2 * t + i;
            if (at > row_position[half] || (p.window > 0 && at + p.window <= row_position[half])) x = -INFINITY;
          }
          s[n][2 * half + i] = x;
          peak = fmaxf(peak, x);
        }
      }
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
      const float reference = peak == -INFINITY ? 0.f : peak;
      const float keep = exp2f(row_max[half] - reference);
      row_max[half] = peak;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float weight = exp2f(s[n][2 * half + i] - reference);
          s[n][2 * half + i] = weight;
          sum += weight;
        }
      }
      row_sum[half] = row_sum[half] * keep + sum;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        o[n][2 * half] *= keep;
        o[n][2 * half + 1] *= keep;
      }
    }
#pragma unroll
    for (int c = 0; c < N / 16; c++) {
      const uint32_t a0 = pack_bf16(s[2 * c][0], s[2 * c][1]), a1 = pack_bf16(s[2 * c][2], s[2 * c][3]);
      const uint32_t a2 = pack_bf16(s[2 * c + 1][0], s[2 * c + 1][1]), a3 = pack_bf16(s[2 * c + 1][2], s[2 * c + 1][3]);
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        // Matrices: 16 positions as two halves, each with columns 0-7 and 8-15 of the 16, transposed.
        uint32_t b[4];
        ldmatrix_x4_trans(b, values + (c * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE + n * 16 + lane / 16 * 8);
        mma_bf16(o[2 * n], a0, a1, a2, a3, b[0], b[1]);
        mma_bf16(o[2 * n + 1], a0, a1, a2, a3, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    row_sum[half] += __shfl_xor_sync(0xffffffffu, row_sum[half], 1);
    row_sum[half] += __shfl_xor_sync(0xffffffffu, row_sum[half], 2);
    if (!row_valid[half]) continue;
    const int r = warp * 16 + half * 8 + g;
    bf16* to = p.out + (row_offset[half] * p.num_heads + kv_head * group + r % group) * D;
    const float inverse = 1.f / row_sum[half];
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint32_t*>(to + n * 8 + 2 * t) = pack_bf16(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
  }
}

#define PREFILL_KERNEL(D, N) \
  KERNEL __launch_bounds__(256) attention_prefill_d##D(const __grid_constant__ PrefillArgs args) { prefill<D, N>(args); }
PREFILL_KERNEL(64, 64)
PREFILL_KERNEL(96, 64)
PREFILL_KERNEL(128, 64)
PREFILL_KERNEL(256, 32)
