// attention_decode.cu   o[s,h,:] = softmax(scale · q[s,h]·K[0..len)ᵀ) · V[0..len)   one query row a sequence, paged K and V
//                       Source: online softmax arXiv:1805.02867, split over K and V arXiv:2311.01282, pages arXiv:2309.06180
// Shapes  q [rows, q_stride] bf16 (head h at h·D); sequence s has row rows[s], or row s if that is null; k, v [num_blocks, KV, block_size, D] bf16, blocks block_stride apart; context_lens [S] (0: the row is left alone);
//         block_table_starts [S], block_tables: block of positions p of sequence s is block_tables[starts[s] + p / block_size];
//         out [rows, H·D] bf16; partial [S, H, max_splits, D + 2] f32 and counters [S, KV] u32 (all 0, left 0) when max_splits > 1
// Launch  grid (KV, S, max_splits), block 128 or 256, dynamic shared 4·warps·heads·(D + 3) bytes with heads 8 or 16: a block serves the H/KV
//         query heads that share a K/V head and one split of the positions; the last block of a (sequence, K/V head) to finish merges the
//         splits, in their order
// Cost    bytes 4·KV·D·Σ len, flops 4·H·D·Σ len: bandwidth is the roof
// Limits  D in {64, 96, 128, 256}; H/KV <= 16; block_size a power of two, at least 16
// Variants heads8 for H/KV <= 8 (half of the registers), heads16
#include "common.cuh"

struct DecodeArgs {
  bf16* out;
  const bf16* q;
  const bf16* k;
  const bf16* v;
  const uint32_t* rows;
  const uint32_t* context_lens;
  const uint32_t* block_table_starts;
  const uint32_t* block_tables;
  float* partial;
  uint32_t* counters;
  int64_t block_stride;  // elements from one block of k (and of v) to the next
  int q_stride;
  int num_heads;
  int num_kv_heads;
  int block_shift;  // log2 of the positions of a block
  int max_splits;
  int min_split;  // positions below which a split is not worth its merge; % 64 == 0
  int window;     // 0: none
  float scale;
};

// Each warp takes groups of 16 positions in turn: K, straight from memory (permuted k), is the left operand against the heads' queries, of which
// few fill the right one, then V the left one against the probabilities, both transposed in registers. So scores and sums take the least
// registers, and what hides memory's latency is blocks side by side. Nothing passes through shared memory until the warps' results are merged.
template <int D, bool heads8>
DEVICE void decode(const DecodeArgs& p) {
  constexpr int CHUNKS = D / 32;
  constexpr int TILES = heads8 ? 1 : 2;  // of 8 heads
  constexpr int ROWS = 8 * TILES;
  constexpr int STRIDE = D + 1;  // lanes that store together lie in 32 banks
  constexpr bool V_LATER = D > 128;  // K and V together would not fit the registers
  DYNAMIC_SHARED(float, shared);  // [warp][ROWS][STRIDE], then maxima and sums [warp][ROWS]
  __shared__ bool is_last;
  const int num_warps = blockDim.x / 32;
  float* shared_max = shared + num_warps * ROWS * STRIDE;
  float* shared_sum = shared_max + num_warps * ROWS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.x, sequence = blockIdx.y, split = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads;
  const int len = (int)p.context_lens[sequence];
  const int64_t row_of_batch = p.rows == nullptr ? sequence : p.rows[sequence];
  const uint32_t* block_table = p.block_tables + p.block_table_starts[sequence];
  const int first = p.window > 0 && len > p.window ? (len - p.window) & ~15 : 0;
  const int visible_from = p.window > 0 && len > p.window ? len - p.window : 0;
  int per_split = ((len - first + p.max_splits - 1) / p.max_splits + 63) & ~63;
  if (per_split < p.min_split) per_split = p.min_split;
  const int num_splits = (len - first + per_split - 1) / per_split;
  const int begin = first + split * per_split;
  const int end = min(len, begin + per_split);
  allow_next_kernel();
  if (begin >= end) {
    wait_for_previous_kernel();
    return;
  }
  // The block ids of the warp's next 32 groups, one a lane, so that no group waits for its own.
  const int step = num_warps * 16;
  auto block_of = [&](int position) { return position < end ? block_table[position >> p.block_shift] : 0; };
  uint32_t blocks = block_of(begin + warp * 16 + lane * step);
  const int own = len - 1;
  const float scale_log2 = p.scale * 1.4426950408889634f;
  // The heads' queries, of each warp its own, where its results will be.
  constexpr int Q_STRIDE = D + 32;
  bf16* q = reinterpret_cast<bf16*>(shared + warp * ROWS * STRIDE) + g * Q_STRIDE + t * 8;
  // Of heads 2t and 2t + 1 of each tile; of all positions so far, and of the lane's.
  float peak[TILES][2], sum[TILES][2];
#pragma unroll
  for (int i = 0; i < 2 * TILES; i++) peak[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0.f;
  // o[c][i][tile]: (row g, heads 2t and 2t + 1), (row g + 8, the same), of which rows are columns 8·(g / 2) + g % 2 + 4·i of chunk c, and 2 more.
  float o[CHUNKS][2][TILES][4] = {};
  bool waited = false;
  int turn = 0;
  for (int position = begin + warp * 16; position < end; position += step, turn++) {
    if (turn == 32) {
      turn = 0;
      blocks = block_of(position + lane * step);
    }
    const uint32_t block = __shfl_sync(0xffffffffu, blocks, turn);
    const int64_t offset = block * p.block_stride + ((kv_head << p.block_shift) + (position & ((1 << p.block_shift) - 1)) + g) * D + t * 8;
    // The cache has held every position but the step's own since earlier steps: the first group is asked for while the kernel before this one
    // still runs. The own position is read afterwards, past a cache that may hold what was there before.
    uint4 keys[2][CHUNKS], values[2][CHUNKS];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const bool valid = position + n * 8 + g < min(end, own);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) keys[n][c] = valid ? load_stream_16(p.k + offset + n * 8 * D + c * 32) : zero_16();
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        if (!V_LATER) values[n][c] = valid ? load_stream_16(p.v + offset + n * 8 * D + c * 32) : zero_16();
      }
    }
    if (!waited) {
      waited = true;
      wait_for_previous_kernel();
#pragma unroll
      for (int i = 0; i < TILES * CHUNKS; i++) {
        const int tile = i / CHUNKS, c = i % CHUNKS;
        const bf16* from = p.q + row_of_batch * p.q_stride + ((int64_t)kv_head * group + tile * 8 + g) * D + c * 32 + t * 8;
        *reinterpret_cast<uint4*>(q + tile * 8 * Q_STRIDE + c * 32) = tile * 8 + g < group ? load_16(from) : zero_16();
      }
      __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      if (position + n * 8 + g == own) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          keys[n][c] = load_fresh_16(p.k + offset + n * 8 * D + c * 32);
          if (!V_LATER) values[n][c] = load_fresh_16(p.v + offset + n * 8 * D + c * 32);
        }
      }
    }
    // Positions g and g + 8, heads 2t and 2t + 1 of each. Two chains of instructions, since each waits for the one before it.
    float s[TILES][4] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float other[4] = {};
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const uint4 &low = keys[0][c], &high = keys[1][c], query = load_16(q + tile * 8 * Q_STRIDE + c * 32);
        mma_bf16(s[tile], low.x, high.x, low.y, high.y, query.x, query.y);
        mma_bf16(other, low.z, high.z, low.w, high.w, query.z, query.w);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) s[tile][i] += other[i];
    }
    uint32_t weights[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = position + i / 2 * 8 + g;
        x[i] = at < end && at >= visible_from ? s[tile][i] * scale_log2 : -INFINITY;
      }
#pragma unroll
      for (int head = 0; head < 2; head++) {
        float new_peak = fmaxf(peak[tile][head], fmaxf(x[head], x[head + 2]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) new_peak = fmaxf(new_peak, __shfl_xor_sync(0xffffffffu, new_peak, mask));
        const float reference = new_peak == -INFINITY ? 0.f : new_peak;
        const float keep = exp2_fast(peak[tile][head] - reference);
        peak[tile][head] = new_peak;
        x[head] = exp2_fast(x[head] - reference);
        x[head + 2] = exp2_fast(x[head + 2] - reference);
        sum[tile][head] = sum[tile][head] * keep + (x[head] + x[head + 2]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            o[c][i][tile][head] *= keep;
            o[c][i][tile][head + 2] *= keep;
          }
        }
      }
      weights[tile][0] = transpose_8x8(pack_bf16(x[0], x[1]));
      weights[tile][1] = transpose_8x8(pack_bf16(x[2], x[3]));
    }
    if (V_LATER) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int at = position + n * 8 + g;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) values[n][c] = at < end ? load_fresh_16(p.v + offset + n * 8 * D + c * 32) : zero_16();
      }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const uint32_t low[4] = {values[0][c].x, values[0][c].y, values[0][c].z, values[0][c].w};
      const uint32_t high[4] = {values[1][c].x, values[1][c].y, values[1][c].z, values[1][c].w};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t a0 = transpose_8x8(low[2 * i]), a1 = transpose_8x8(low[2 * i + 1]);
        const uint32_t a2 = transpose_8x8(high[2 * i]), a3 = transpose_8x8(high[2 * i + 1]);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) mma_bf16(o[c][i][tile], a0, a1, a2, a3, weights[tile][0], weights[tile][1]);
      }
    }
  }

  if (!waited) wait_for_previous_kernel();
  __syncwarp();

  // Merge of the warps, in their order.
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
    for (int head = 0; head < 2; head++) {
      const int row = tile * 8 + 2 * t + head;
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum[tile][head] += __shfl_xor_sync(0xffffffffu, sum[tile][head], mask);
      if (g == 0) {
        shared_max[warp * ROWS + row] = peak[tile][head];
        shared_sum[warp * ROWS + row] = sum[tile][head];
      }
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          shared[(warp * ROWS + row) * STRIDE + c * 32 + g / 2 * 8 + g % 2 + 2 * i] = o[c][i / 2][tile][i % 2 * 2 + head];
      }
    }
  }
  __syncthreads();
  float* partial = p.partial + ((int64_t)sequence * p.num_heads + (int64_t)kv_head * group) * p.max_splits * (D + 2);
  for (int i = threadIdx.x; i < group * (D / 2); i += blockDim.x) {
    const int row = i / (D / 2), column = i % (D / 2) * 2;
    float peak = -INFINITY, sum = 0.f, a = 0.f, b = 0.f;
    for (int w = 0; w < num_warps; w++) peak = fmaxf(peak, shared_max[w * ROWS + row]);
    for (int w = 0; w < num_warps; w++) {
      const float warp_max = shared_max[w * ROWS + row];
      const float factor = warp_max == -INFINITY ? 0.f : exp2_fast(warp_max - peak);
      const float* value = shared + (w * ROWS + row) * STRIDE + column;
      sum += factor * shared_sum[w * ROWS + row];
      a += factor * value[0];
      b += factor * value[1];
    }
    if (num_splits == 1) {
      *reinterpret_cast<uint32_t*>(p.out + (row_of_batch * p.num_heads + kv_head * group + row) * D + column) = pack_bf16(a / sum, b / sum);
    } else {
      float* to = partial + ((int64_t)row * p.max_splits + split) * (D + 2);
      *reinterpret_cast<float2*>(to + column) = make_float2(a, b);
      if (column == 0) *reinterpret_cast<float2*>(to + D) = make_float2(peak, sum);
    }
  }
  if (num_splits == 1) return;

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.counters + (int64_t)sequence * p.num_kv_heads + kv_head, 1u) == (uint32_t)num_splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) p.counters[(int64_t)sequence * p.num_kv_heads + kv_head] = 0;
  for (int i = threadIdx.x; i < group * (D / 2); i += blockDim.x) {
    const int row = i / (D / 2), column = i % (D / 2) * 2;
    const volatile float* from = partial + (int64_t)row * p.max_splits * (D + 2);
    float peak = -INFINITY;
    for (int s = 0; s < num_splits; s++) peak = fmaxf(peak, from[s * (D + 2) + D]);
    float sum = 0.f, a = 0.f, b = 0.f;
    for (int s = 0; s < num_splits; s++) {
      const float split_max = from[s * (D + 2) + D];
      const float factor = split_max == -INFINITY ? 0.f : exp2_fast(split_max - peak);
      sum += factor * from[s * (D + 2) + D + 1];
      a += factor * from[s * (D + 2) + column];
      b += factor * from[s * (D + 2) + column + 1];
    }
    *reinterpret_cast<uint32_t*>(p.out + (row_of_batch * p.num_heads + kv_head * group + row) * D + column) = pack_bf16(a / sum, b / sum);
  }
}

// MOST_THREADS bounds the registers: 512 leave 128 a thread, so that four blocks of 4 warps fit a multiprocessor, 384 leave 168.
#define DECODE_KERNEL(D, HEADS, MOST_THREADS) \
  KERNEL __launch_bounds__(MOST_THREADS) attention_decode_d##D##_heads##HEADS(const __grid_constant__ DecodeArgs args) { decode<D, HEADS == 8>(args); }
DECODE_KERNEL(64, 8, 512)
DECODE_KERNEL(64, 16, 512)
DECODE_KERNEL(96, 8, 512)
DECODE_KERNEL(96, 16, 384)
DECODE_KERNEL(128, 8, 512)
DECODE_KERNEL(128, 16, 384)
DECODE_KERNEL(256, 8, 256)
DECODE_KERNEL(256, 16, 256)
