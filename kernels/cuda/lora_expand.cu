// lora_expand.cu   y[t, slice] += scaling · (Σ_s v[s,t, ranks of slice]) · Bᵀ[adapter(t), slice]   Source: arXiv:2310.18547
//                  v f32 from lora_shrink, rounded to bf16 after scaling; Bᵀ bf16; sums f32; y bf16 or f32, accumulated into
// Shapes  v [num_splits, split_rows, v_stride] f32; per slice Bᵀ [lora_rank, d_out] by descriptor; y [T, y_stride], slices side by side
// Layout  row-major, rows 16-byte aligned; items as in lora_shrink (rank_tile is not read); rows in no item are not touched
// Launch  grid any (blocks stride over items · column tiles of 512), block 128
// Cost    flops 2·Σ rows·lora_rank·d_out; bytes 2·Σ lora_rank·d_out + 2·size(y)·Σ rows·d_out + 4·num_splits·Σ rows·rank_total:
//         bandwidth is the roof for few rows; for many, reading and writing y is
// Limits  d_out of each slice % 8 == 0; y_stride % 8 == 0
// Variants naive: one thread an output; rows8: items of up to 8 rows (decode); rows64: of up to 64 rows (prefill)
// Gated    y[t,j] = act(gate[t,j] + Δgate) · (up[t,j] + Δup): the expand of gate and up and the activation in one pass, so that the widest
//          rows of the model are read once and never written back. Its items cover every row; base rows have descriptors 0. Column tiles of 256
#include "common.cuh"

// Slices of y: d_out of each (0 past the last) and the first column tile of each.
struct SliceLayout {
  int d_out[3];
  int tile_start[3];
  int num_tiles;
};

struct ExpandArgs {
  const float* v;
  const LoraItem* items;
  const uint32_t* num_items;
  SliceLayout slices;
  uint32_t descriptor_offset;
  int num_splits;
  int64_t split_rows;
  int v_stride;
  int y_stride;
};

// Two neighbouring ranks of a row of v: the splits in their order, 8 of them asked for at once.
DEVICE void sum_splits(const float* from, const ExpandArgs& args, bool has_first, bool has_second, float& first, float& second) {
  const int64_t step = args.split_rows * args.v_stride;
  for (int s0 = 0; s0 < args.num_splits; s0 += 8) {
    float a[8], b[8];
#pragma unroll
    for (int s = 0; s < 8; s++) {
      const bool valid = s0 + s < args.num_splits;
      a[s] = valid && has_first ? from[(s0 + s) * step] : 0.f;
      b[s] = valid && has_second ? from[(s0 + s) * step + 1] : 0.f;
    }
#pragma unroll
    for (int s = 0; s < 8; s++) {
      first += a[s];
      second += b[s];
    }
  }
}

// 8 neighbouring values of y.
template <typename Y>
struct Vector8;
template <>
struct Vector8<bf16> {
  uint4 values;
  DEVICE_METHOD void load(const bf16* y) { values = load_16(y); }
  DEVICE_METHOD void store_sum(bf16* y, const float (&delta)[8]) const {
    *reinterpret_cast<uint4*>(y) = make_uint4(
        pack_bf16(low_bf16(values.x) + delta[0], high_bf16(values.x) + delta[1]), pack_bf16(low_bf16(values.y) + delta[2], high_bf16(values.y) + delta[3]),
        pack_bf16(low_bf16(values.z) + delta[4], high_bf16(values.z) + delta[5]), pack_bf16(low_bf16(values.w) + delta[6], high_bf16(values.w) + delta[7]));
  }
};
template <>
struct Vector8<float> {
  float4 a, b;
  DEVICE_METHOD void load(const float* y) {
    a = reinterpret_cast<const float4*>(y)[0];
    b = reinterpret_cast<const float4*>(y)[1];
  }
  DEVICE_METHOD void store_sum(float* y, const float (&delta)[8]) const {
    reinterpret_cast<float4*>(y)[0] = make_float4(a.x + delta[0], a.y + delta[1], a.z + delta[2], a.w + delta[3]);
    reinterpret_cast<float4*>(y)[1] = make_float4(b.x + delta[4], b.y + delta[5], b.z + delta[6], b.w + delta[7]);
  }
};

// A warp owns 128 columns as 4 groups of 32; lane (g, t) loads 8 columns of rank row g (and g+8) at once and `transpose_8x8` makes B fragments
// of them. The column that fragment j calls n = 2t + i is column 8t + 2j + i of the group, so that a lane ends with 8 neighbouring columns.
template <typename Y, bool rows8>
DEVICE void expand(Y* y, const ExpandArgs& args) {
  constexpr int MAX_ROWS = rows8 ? 8 : 64;
  __shared__ __align__(16) uint32_t v_shared[MAX_ROWS < 16 ? 16 : MAX_ROWS][8 + 1];  // 16 ranks of each row, as pairs of bf16
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * args.slices.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const LoraItem item = args.items[work / args.slices.num_tiles];
    const int tile = work % args.slices.num_tiles;
    const int slice = tile >= args.slices.tile_start[2] ? 2 : tile >= args.slices.tile_start[1] ? 1 : 0;
    const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
    const int lora_rank = d->lora_rank[slice];
    if (lora_rank == 0) continue;
    int rank_start = 0, y_start = 0;
    for (int s = 0; s < slice; s++) {
      rank_start += d->lora_rank[s];
      y_start += args.slices.d_out[s];
    }
    const bf16* b_t = d->b_t[slice];
    const float scaling = d->scaling[slice];
    const int d_out = args.slices.d_out[slice];
    const int column0 = (tile - args.slices.tile_start[slice]) * 512 + warp * 128 + t * 8;
    Y* y_item = y + (int64_t)item.row_start * args.y_stride + y_start + column0;
    Vector8<Y> old[4];  // rows8: y is fetched as soon as it may be, beside v
    for (int row0 = 0; row0 < item.num_rows; row0 += 16) {
      float acc[4][4][4] = {};
      for (int k0 = 0; k0 < lora_rank; k0 += 16) {
        uint4 low[4], high[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int column = column0 + c * 32;
          const int r = k0 + g;
          low[c] = column < d_out && r < lora_rank ? load_16(b_t + (int64_t)r * d_out + column) : zero_16();
          high[c] = column < d_out && r + 8 < lora_rank ? load_16(b_t + (int64_t)(r + 8) * d_out + column) : zero_16();
        }
        if (!waited) {
          wait_for_previous_kernel();
          waited = true;
        }
        if (rows8 && k0 == 0 && g < item.num_rows) {
#pragma unroll
          for (int c = 0; c < 4; c++) {
            if (column0 + c * 32 < d_out) old[c].load(y_item + (int64_t)g * args.y_stride + c * 32);
          }
        }
        // The rows' 16 values of v: splits added in their order, scaled, rounded. All rows at the item's first turn if one chunk of ranks is all.
        if (row0 == 0 || lora_rank > 16) {
          __syncthreads();
          const int first = lora_rank > 16 ? row0 : 0;
          const int count = lora_rank > 16 ? min(16, item.num_rows - row0) : item.num_rows;
          for (int i = threadIdx.x; i < ((count + 15) & ~15) * 8; i += 128) {
            const int row = i / 8, r = k0 + i % 8 * 2;
            float a = 0.f, b = 0.f;
            if (row < count) {
              const float* from = args.v + (item.row_start + first + row) * (int64_t)args.v_stride + rank_start + r;
              sum_splits(from, args, r < lora_rank, r + 1 < lora_rank, a, b);
            }
            v_shared[row][i % 8] = pack_bf16(scaling * a, scaling * b);
          }
          __syncthreads();
        }
        const int base = lora_rank > 16 ? 0 : row0;
        const uint32_t a0 = v_shared[base + g][t], a2 = v_shared[base + g][t + 4];
        const uint32_t a1 = rows8 ? 0 : v_shared[base + g + 8][t], a3 = rows8 ? 0 : v_shared[base + g + 8][t + 4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const uint32_t l[4] = {low[c].x, low[c].y, low[c].z, low[c].w}, h[4] = {high[c].x, high[c].y, high[c].z, high[c].w};
#pragma unroll
          for (int j = 0; j < 4; j++) mma_bf16(acc[c][j], a0, a1, a2, a3, transpose_8x8(l[j]), transpose_8x8(h[j]));
        }
      }
#pragma unroll
      for (int half = 0; half < (rows8 ? 1 : 2); half++) {
        const int row = row0 + half * 8 + g;
        if (row < item.num_rows) {
#pragma unroll
          for (int c = 0; c < 4; c++) {
            const int column = column0 + c * 32;
            if (column < d_out) {
              float delta[8];
#pragma unroll
              for (int j = 0; j < 4; j++) {
                delta[2 * j] = acc[c][j][2 * half];
                delta[2 * j + 1] = acc[c][j][2 * half + 1];
              }
              Y* to = y_item + (int64_t)row * args.y_stride + c * 32;
              if (!rows8) old[c].load(to);
              old[c].store_sum(to, delta);
            }
          }
        }
      }
    }
    __syncthreads();
  }
  if (!waited) wait_for_previous_kernel();
}

KERNEL __launch_bounds__(128) lora_expand_rows8_bf16(bf16* y, const __grid_constant__ ExpandArgs args) { expand<bf16, true>(y, args); }
KERNEL __launch_bounds__(128, 3) lora_expand_rows8_f32(float* y, const __grid_constant__ ExpandArgs args) { expand<float, true>(y, args); }
KERNEL __launch_bounds__(128) lora_expand_rows64_bf16(bf16* y, const __grid_constant__ ExpandArgs args) { expand<bf16, false>(y, args); }
KERNEL __launch_bounds__(128) lora_expand_rows64_f32(float* y, const __grid_constant__ ExpandArgs args) { expand<float, false>(y, args); }

// As `expand`, but a warp owns 64 columns of gate and the same 64 of up.
template <bool rows8, float (*act)(float)>
DEVICE void expand_gated(const bf16* gate_up, bf16* y, const ExpandArgs& args) {
  constexpr int HALVES = rows8 ? 1 : 2;
  __shared__ uint32_t v_shared[2][rows8 ? 8 : 64][8 + 1];  // 16 ranks of each row of gate and of up, as pairs of bf16
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int ffn = args.slices.d_out[0];
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * args.slices.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const LoraItem item = args.items[work / args.slices.num_tiles];
    const int column0 = work % args.slices.num_tiles * 256 + warp * 64 + t * 8;
    int ranks[2] = {0, 0};
    const bf16* b_t[2] = {nullptr, nullptr};
    float scaling[2] = {0.f, 0.f};
    if (item.descriptors != 0) {
      const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
#pragma unroll
      for (int slice = 0; slice < 2; slice++) {
        ranks[slice] = d->lora_rank[slice];
        b_t[slice] = d->b_t[slice];
        scaling[slice] = d->scaling[slice];
      }
    }
    const int max_rank = max(ranks[0], ranks[1]);
    const bool one_chunk = max_rank <= 16;
    for (int row0 = 0; row0 < item.num_rows; row0 += 16) {
      float acc[2][2][4][4] = {};
      uint4 gate[HALVES][2], up[HALVES][2];
      for (int k0 = 0; k0 == 0 || k0 < max_rank; k0 += 16) {
        uint4 low[2][2], high[2][2];
#pragma unroll
        for (int slice = 0; slice < 2; slice++) {
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int column = column0 + c * 32, r = k0 + g;
            const bf16* from = b_t[slice] + (int64_t)r * ffn + column;
            low[slice][c] = column < ffn && r < ranks[slice] ? load_16(from) : zero_16();
            high[slice][c] = column < ffn && r + 8 < ranks[slice] ? load_16(from + 8 * (int64_t)ffn) : zero_16();
          }
        }
        if (!waited) {
          wait_for_previous_kernel();
          waited = true;
        }
        if (k0 == 0) {
#pragma unroll
          for (int half = 0; half < HALVES; half++) {
            const int row = row0 + half * 8 + g;
#pragma unroll
            for (int c = 0; c < 2; c++) {
              const bool valid = row < item.num_rows && column0 + c * 32 < ffn;
              const bf16* from = gate_up + (int64_t)(item.row_start + row) * 2 * ffn + column0 + c * 32;
              gate[half][c] = valid ? load_16(from) : zero_16();
              up[half][c] = valid ? load_16(from + ffn) : zero_16();
            }
          }
        }
        if (max_rank == 0) break;
        if (row0 == 0 || !one_chunk) {
          const int first = one_chunk ? 0 : row0;
          const int count = min(rows8 ? 8 : one_chunk ? 64 : 16, item.num_rows - first);
          const int padded = rows8 ? 8 : (count + 15) & ~15;
          __syncthreads();
          for (int i = threadIdx.x; i < 2 * padded * 8; i += 128) {
            const int slice = i / (padded * 8), row = i / 8 % padded, r = k0 + i % 8 * 2;
            const int rank = slice == 0 ? ranks[0] : ranks[1];
            const float scale = slice == 0 ? scaling[0] : scaling[1];
            float a = 0.f, b = 0.f;
            if (row < count) {
              const float* from = args.v + (item.row_start + first + row) * (int64_t)args.v_stride + slice * ranks[0] + r;
              sum_splits(from, args, r < rank, r + 1 < rank, a, b);
            }
            v_shared[slice][row][i % 8] = pack_bf16(scale * a, scale * b);
          }
          __syncthreads();
        }
        const int base = one_chunk ? row0 : 0;
#pragma unroll
        for (int slice = 0; slice < 2; slice++) {
          const uint32_t a0 = v_shared[slice][base + g][t], a2 = v_shared[slice][base + g][t + 4];
          const uint32_t a1 = rows8 ? 0 : v_shared[slice][base + g + 8][t], a3 = rows8 ? 0 : v_shared[slice][base + g + 8][t + 4];
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const uint32_t l[4] = {low[slice][c].x, low[slice][c].y, low[slice][c].z, low[slice][c].w};
            const uint32_t h[4] = {high[slice][c].x, high[slice][c].y, high[slice][c].z, high[slice][c].w};
#pragma unroll
            for (int j = 0; j < 4; j++) mma_bf16(acc[slice][c][j], a0, a1, a2, a3, transpose_8x8(l[j]), transpose_8x8(h[j]));
          }
        }
      }
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        const int row = row0 + half * 8 + g;
        if (row < item.num_rows) {
#pragma unroll
          for (int c = 0; c < 2; c++) {
            if (column0 + c * 32 < ffn) {
              const uint32_t gates[4] = {gate[half][c].x, gate[half][c].y, gate[half][c].z, gate[half][c].w};
              const uint32_t ups[4] = {up[half][c].x, up[half][c].y, up[half][c].z, up[half][c].w};
              uint32_t out[4];
#pragma unroll
              for (int j = 0; j < 4; j++)
                out[j] = pack_bf16(
                    act(low_bf16(gates[j]) + acc[0][c][j][2 * half]) * (low_bf16(ups[j]) + acc[1][c][j][2 * half]),
                    act(high_bf16(gates[j]) + acc[0][c][j][2 * half + 1]) * (high_bf16(ups[j]) + acc[1][c][j][2 * half + 1]));
              *reinterpret_cast<uint4*>(y + (int64_t)(item.row_start + row) * ffn + column0 + c * 32) = make_uint4(out[0], out[1], out[2], out[3]);
            }
          }
        }
      }
    }
    __syncthreads();
  }
  if (!waited) wait_for_previous_kernel();
}

#define GATED_KERNEL(name, rows8, act) \
  KERNEL __launch_bounds__(128) name(const bf16* gate_up, bf16* y, const __grid_constant__ ExpandArgs args) { expand_gated<rows8, act>(gate_up, y, args); }
GATED_KERNEL(lora_expand_silu_rows8, true, silu)
GATED_KERNEL(lora_expand_silu_rows64, false, silu)
GATED_KERNEL(lora_expand_gelu_rows8, true, gelu_tanh)
GATED_KERNEL(lora_expand_gelu_rows64, false, gelu_tanh)

DEVICE float to_f32(bf16 x) { return __bfloat162float(x); }
DEVICE float to_f32(float x) { return x; }
DEVICE void from_f32(bf16* to, float x) { *to = __float2bfloat16_rn(x); }
DEVICE void from_f32(float* to, float x) { *to = x; }

// One thread an output: right, and slow.
template <typename Y>
DEVICE void expand_naive(Y* y, const ExpandArgs& args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  for (uint32_t work = blockIdx.x; work < *args.num_items; work += gridDim.x) {
    const LoraItem item = args.items[work];
    const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
    int rank_start = 0, y_start = 0;
    for (int slice = 0; slice < 3; slice++) {
      const int d_out = args.slices.d_out[slice], lora_rank = d->lora_rank[slice];
      if (lora_rank > 0) {
        for (int64_t i = threadIdx.x; i < (int64_t)item.num_rows * d_out; i += blockDim.x) {
          const int64_t row = item.row_start + i / d_out;
          const int column = (int)(i % d_out);
          float sum = 0.f;
          for (int r = 0; r < lora_rank; r++) {
            float v = 0.f;
            for (int s = 0; s < args.num_splits; s++) v += args.v[(s * args.split_rows + row) * args.v_stride + rank_start + r];
            sum += __bfloat162float(__float2bfloat16_rn(d->scaling[slice] * v)) * __bfloat162float(d->b_t[slice][(int64_t)r * d_out + column]);
          }
          Y* to = y + row * args.y_stride + y_start + column;
          from_f32(to, to_f32(*to) + sum);
        }
      }
      rank_start += lora_rank;
      y_start += d_out;
    }
  }
}

KERNEL __launch_bounds__(128) lora_expand_naive_bf16(bf16* y, const __grid_constant__ ExpandArgs args) { expand_naive<bf16>(y, args); }
KERNEL __launch_bounds__(128) lora_expand_naive_f32(float* y, const __grid_constant__ ExpandArgs args) { expand_naive<float>(y, args); }
