// lora_expand.cu   y[t, slice] += v[t, ranks of slice] · Bᵀ[adapter(t), slice]   v (scaled) from lora_shrink; Bᵀ bf16; sums f32; y bf16 or f32
//                  Source: arXiv:2310.18547
// Shapes  v [T, v_stride] bf16, each slice's ranks from the next multiple of 16 on; per slice Bᵀ [lora_rank, d_out] by descriptor;
//         y [T, y_stride], slices side by side, accumulated into
// Layout  row-major, rows 16-byte aligned; items as in lora_shrink (rank_tile is not read); rows in no item are not touched
// Launch  grid any (blocks stride over items · column tiles of 512), block 128; rows64 with a ring in dynamic shared memory
// Cost    flops 2·Σ rows·lora_rank·d_out; bytes 2·Σ lora_rank·d_out + 2·size(y)·Σ rows·d_out + 2·Σ rows·rank_total·(column tiles):
//         bandwidth is the roof for few rows; for many, reading and writing y is
// Limits  d_out of each slice % 8 == 0; y_stride % 8 == 0; v_stride % 16 == 0
// Variants naive: one thread an output; rows8: items of up to 8 rows (decode); rows64: of up to 64 rows (prefill)
// Fused    What follows an expand may be done on the way, by items that cover every row (base rows have descriptors 0), so that the rows are
//          read once: rope: q, k, v are rotated and K and V written to the cache (rope_kv.cu), a warp has whole heads; gated:
//          y[t,j] = act(gate[t,j] + Δgate) · (up[t,j] + Δup) (activation.cu), column tiles of 256; norm: the residual stream is normed
//          (rms_norm.cu), a cluster has whole rows
#include "common.cuh"

// Slices of y: d_out of each (0 past the last) and the first column tile of each.
struct SliceLayout {
  int d_out[3];
  int tile_start[3];
  int num_tiles;
};

struct ExpandArgs {
  const bf16* v;
  const LoraItem* items;
  const uint32_t* num_items;
  SliceLayout slices;
  uint32_t descriptor_offset;
  int v_stride;
  int y_stride;
};

// Where a slice's ranks end in a row of v.
DEVICE int padded_rank(int lora_rank) { return (lora_rank + 15) & ~15; }

// The left operand: 16 ranks from k0 on of rows `row` and row + 8, of which `num_rows` are the item's. `v` is the item's first row's, at the slice.
// Without barriers or shared memory: each lane loads what it holds.
template <bool rows8>
DEVICE void load_v(uint32_t (&a)[4], const bf16* v, int v_stride, int row, int num_rows, int k0, int lora_rank, int t) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = k0 + 2 * t + i / 2 * 8, at = row + i % 2 * 8;
    uint32_t pair = 0;
    if (!(rows8 && i % 2 == 1) && at < num_rows && r < lora_rank) pair = *reinterpret_cast<const uint32_t*>(v + (int64_t)at * v_stride + r);
    a[i] = r + 1 < lora_rank ? pair : pair & 0xffffu;  // what lies between slices is nobody's
  }
}

// 8 columns of Bᵀ from `column` on, of rank r: zeros where there is no such rank or column.
DEVICE uint4 load_b(const bf16* b_t, int r, int lora_rank, int column, int d_out) {
  return column < d_out && r < lora_rank ? load_16(b_t + (int64_t)r * d_out + column) : zero_16();
}

// acc += 8 rows of v times 32 columns of Bᵀ, of which `low` and `high` are ranks g and g + 8 as `load_b` gives them.
DEVICE void multiply_rows8(float (&acc)[4][4], const uint32_t (&a)[4], const uint4& low, const uint4& high) {
  const uint32_t l[4] = {low.x, low.y, low.z, low.w}, h[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
  for (int j = 0; j < 4; j++) mma_bf16(acc[j], a[0], 0, a[2], 0, transpose_8x8(l[j]), transpose_8x8(h[j]));
}

// The rotary embedding that follows the expand of q, k, v, as in rope_kv.cu.
struct RopeArgs {
  const uint32_t* positions;
  const uint32_t* kv_slots;
  const float2* cos_sin;
  const bf16* q_norm;
  const bf16* k_norm;
  bf16* k_cache;
  bf16* v_cache;
  int64_t block_stride;
  int block_size;
  uint32_t reserved;
  uint32_t max_position;
  float eps;
};

// 8 neighbouring values of y.
template <typename Y>
struct Vector8;
template <>
struct Vector8<bf16> {
  uint4 values;
  DEVICE_METHOD void load(const bf16* y) { values = load_16(y); }
  DEVICE_METHOD void take(const uint4 (&pieces)[1]) { values = pieces[0]; }
  DEVICE_METHOD uint4 sum(const float (&delta)[8]) const {
    return make_uint4(
        pack_bf16(low_bf16(values.x) + delta[0], high_bf16(values.x) + delta[1]), pack_bf16(low_bf16(values.y) + delta[2], high_bf16(values.y) + delta[3]),
        pack_bf16(low_bf16(values.z) + delta[4], high_bf16(values.z) + delta[5]), pack_bf16(low_bf16(values.w) + delta[6], high_bf16(values.w) + delta[7]));
  }
  DEVICE_METHOD void store_sum(bf16* y, const float (&delta)[8]) const { *reinterpret_cast<uint4*>(y) = sum(delta); }
};
template <>
struct Vector8<float> {
  float4 a, b;
  DEVICE_METHOD void load(const float* y) {
    a = reinterpret_cast<const float4*>(y)[0];
    b = reinterpret_cast<const float4*>(y)[1];
  }
  DEVICE_METHOD void take(const uint4 (&pieces)[2]) {
    a = make_float4(__uint_as_float(pieces[0].x), __uint_as_float(pieces[0].y), __uint_as_float(pieces[0].z), __uint_as_float(pieces[0].w));
    b = make_float4(__uint_as_float(pieces[1].x), __uint_as_float(pieces[1].y), __uint_as_float(pieces[1].z), __uint_as_float(pieces[1].w));
  }
  DEVICE_METHOD void store_sum(float* y, const float (&delta)[8]) const {
    reinterpret_cast<float4*>(y)[0] = make_float4(a.x + delta[0], a.y + delta[1], a.z + delta[2], a.w + delta[3]);
    reinterpret_cast<float4*>(y)[1] = make_float4(b.x + delta[4], b.y + delta[5], b.z + delta[6], b.w + delta[7]);
  }
};

// Norm, rotation and store of a row's 128 columns: 128/D heads, of which `first_head` is the first of slice q, k or v. A lane has columns
// c·32 + t·8 .. + 8 in sums[c], and the four lanes of a row its other columns. q goes to `q`, which is the lane's first column.
template <int D>
DEVICE void rotate_and_store(const RopeArgs& args, const uint4 (&sums)[4], int slice, int first_head, int num_heads, int row, bool valid, int t, bf16* q) {
  constexpr int PARTS = D / 32;
  const uint32_t slot = valid ? args.kv_slots[row] : 0xffffffffu;
  uint32_t position = valid ? args.positions[row] : 0;
  if (position >= args.max_position) position = args.max_position - 1;
#pragma unroll
  for (int h = 0; h < 128 / D; h++) {
    const int head = first_head + h;
    const bool stored = valid && head < num_heads && (slice == 0 || slot != 0xffffffffu);
    bf16* to = q + h * D;
    if (slice != 0 && stored) {
      to = (slice == 1 ? args.k_cache : args.v_cache) + slot / args.block_size * args.block_stride +
           (head * args.block_size + slot % args.block_size) * D + t * 8;
    }
    if (slice == 2) {
#pragma unroll
      for (int c = 0; c < PARTS; c++) {
        if (stored) *reinterpret_cast<uint4*>(to + c * 32) = sums[h * PARTS + c];
      }
      continue;
    }
    const bf16* norm = slice == 0 ? args.q_norm : args.k_norm;
    float inverse = 1.f;
    if (norm != nullptr) {
      float squares = 0.f;
#pragma unroll
      for (int c = 0; c < PARTS; c++) {
        const uint4& x = sums[h * PARTS + c];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i++) squares += low_bf16(words[i]) * low_bf16(words[i]) + high_bf16(words[i]) * high_bf16(words[i]);
      }
      squares += __shfl_xor_sync(0xffffffffu, squares, 1);
      squares += __shfl_xor_sync(0xffffffffu, squares, 2);
      inverse = rsqrtf(squares / D + args.eps);
    }
#pragma unroll
    for (int c = 0; c < PARTS / 2; c++) {
      const int i = c * 32 + t * 8;
      const uint4 &low = sums[h * PARTS + c], &high = sums[h * PARTS + PARTS / 2 + c];
      const uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
      uint32_t low_norm[4], high_norm[4];
      if (norm != nullptr) {
        const uint4 a = load_16(norm + i), b = load_16(norm + D / 2 + i);
        low_norm[0] = a.x, low_norm[1] = a.y, low_norm[2] = a.z, low_norm[3] = a.w;
        high_norm[0] = b.x, high_norm[1] = b.y, high_norm[2] = b.z, high_norm[3] = b.w;
      }
      uint32_t out_low[4], out_high[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float x0 = low_bf16(lows[j]), x1 = high_bf16(lows[j]), y0 = low_bf16(highs[j]), y1 = high_bf16(highs[j]);
        if (norm != nullptr) {
          x0 *= inverse * low_bf16(low_norm[j]);
          x1 *= inverse * high_bf16(low_norm[j]);
          y0 *= inverse * low_bf16(high_norm[j]);
          y1 *= inverse * high_bf16(high_norm[j]);
        }
        const float4 rotation = *reinterpret_cast<const float4*>(args.cos_sin + (int64_t)position * (D / 2) + i + 2 * j);
        out_low[j] = pack_bf16(x0 * rotation.x - y0 * rotation.y, x1 * rotation.z - y1 * rotation.w);
        out_high[j] = pack_bf16(y0 * rotation.x + x0 * rotation.y, y1 * rotation.z + x1 * rotation.w);
      }
      if (stored) {
        *reinterpret_cast<uint4*>(to + c * 32) = make_uint4(out_low[0], out_low[1], out_low[2], out_low[3]);
        *reinterpret_cast<uint4*>(to + D / 2 + c * 32) = make_uint4(out_high[0], out_high[1], out_high[2], out_high[3]);
      }
    }
  }
}

// One unit of work of `expand`: an item's rows and 512 columns of a slice.
struct Unit {
  LoraItem item;
  int slice;
  int lora_rank;
  int v_start;  // of the slice's ranks in a row of v
  int y_start;     // of the slice's columns in a row of y
  int d_out;
  int column;  // in the slice, of the unit's first
  const bf16* b_t;

  DEVICE_METHOD Unit(const ExpandArgs& args, int work) {
    item = args.items[work / args.slices.num_tiles];
    const int tile = work % args.slices.num_tiles;
    slice = tile >= args.slices.tile_start[2] ? 2 : tile >= args.slices.tile_start[1] ? 1 : 0;
    d_out = args.slices.d_out[slice];
    column = (tile - args.slices.tile_start[slice]) * 512;
    lora_rank = 0, v_start = 0, y_start = 0, b_t = nullptr;
    const LoraDescriptor* d = item.descriptors == 0 ? nullptr : reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
    for (int s = 0; s < slice; s++) {
      v_start += d == nullptr ? 0 : padded_rank(d->lora_rank[s]);
      y_start += args.slices.d_out[s];
    }
    if (d != nullptr) {
      lora_rank = d->lora_rank[slice];
      b_t = d->b_t[slice];
    }
  }
};

// A warp owns 128 columns as 4 groups of 32; lane (g, t) loads 8 columns of rank row g (and g+8) at once and `transpose_8x8` makes B fragments
// of them. The column that fragment j calls n = 2t + i is column 8t + 2j + i of the group, so that a lane ends with 8 neighbouring columns.
// D: 0, or the width of a head, of which rotary embedding and KV write follow.
template <typename Y, int D>
DEVICE void expand_rows8(Y* y, const ExpandArgs& args, const RopeArgs& rope) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * args.slices.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const Unit unit(args, work);
    if (D == 0 && unit.lora_rank == 0) continue;
    const int d_out = unit.d_out, lora_rank = unit.lora_rank, column0 = unit.column + warp * 128 + t * 8;
    const int num_rows = min(8, (int)unit.item.num_rows);
    Y* y_row = y + (int64_t)(unit.item.row_start + g) * args.y_stride + unit.y_start + column0;
    const bf16* v = args.v + (int64_t)unit.item.row_start * args.v_stride + unit.v_start;
    Vector8<Y> old[4];  // fetched as soon as it may be, beside v
    float acc[4][4][4] = {};
    for (int k0 = 0; k0 == 0 || k0 < lora_rank; k0 += 16) {
      uint4 low[4], high[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int column = column0 + c * 32, r = k0 + g;
        low[c] = load_b(unit.b_t, r, lora_rank, column, d_out);
        high[c] = load_b(unit.b_t, r + 8, lora_rank, column, d_out);
      }
      if (!waited) {
        wait_for_previous_kernel();
        waited = true;
      }
      if (k0 == 0) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          old[c] = {};
          if (g < num_rows && column0 + c * 32 < d_out) old[c].load(y_row + c * 32);
        }
      }
      if (lora_rank == 0) break;
      uint32_t a[4];
      load_v<true>(a, v, args.v_stride, g, num_rows, k0, lora_rank, t);
#pragma unroll
      for (int c = 0; c < 4; c++) multiply_rows8(acc[c], a, low[c], high[c]);
    }
    uint4 sums[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float delta[8];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        delta[2 * j] = acc[c][j][0];
        delta[2 * j + 1] = acc[c][j][1];
      }
      if constexpr (D != 0) {
        sums[c] = old[c].sum(delta);
      } else if (g < num_rows && column0 + c * 32 < d_out) {
        old[c].store_sum(y_row + c * 32, delta);
      }
    }
    if constexpr (D != 0) {
      const int first_head = (unit.column + warp * 128) / D;
      rotate_and_store<D>(rope, sums, unit.slice, first_head, d_out / D, unit.item.row_start + g, g < num_rows, t, y_row);
    }
  }
  if (!waited) wait_for_previous_kernel();
}

// The same for up to 64 rows, 16 at a time. What is added to is on its way to shared memory two turns ahead, each warp its own part, so that no
// block-wide barrier is needed; B of up to 16 ranks stays in registers.
template <typename Y, int D>
DEVICE void expand_rows64(Y* y, const ExpandArgs& args, const RopeArgs& rope) {
  constexpr int PIECES = sizeof(Y) / 2;  // 16 bytes each, of 8 values
  DYNAMIC_SHARED(uint4, ring);           // [2][half][c][PIECES][128]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * args.slices.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const Unit unit(args, work);
    if (D == 0 && unit.lora_rank == 0) continue;
    const int d_out = unit.d_out, lora_rank = unit.lora_rank, warp_column = unit.column + warp * 128, column0 = warp_column + t * 8;
    const int num_rows = unit.item.num_rows, turns = (num_rows + 15) / 16;
    const bool one_chunk = lora_rank <= 16;
    Y* y_item = y + (int64_t)unit.item.row_start * args.y_stride + unit.y_start;
    const bf16* v = args.v + (int64_t)unit.item.row_start * args.v_stride + unit.v_start;
    // Four neighbouring lanes copy 64 neighbouring bytes, though of f32 each needs 32 of its own.
    auto fetch = [&](int turn) {
      if (turn < turns) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = turn * 16 + half * 8 + g;
#pragma unroll
          for (int c = 0; c < 4; c++) {
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
              const int column = warp_column + c * 32 + (piece * 4 + t) * 8 / PIECES;
              const bool valid = row < num_rows && column < d_out;
              const Y* from = valid ? y_item + (int64_t)row * args.y_stride + column : y;
              copy_async_16(ring + ((turn % 2 * 8 + half * 4 + c) * PIECES + piece) * 128 + threadIdx.x, from, valid);
            }
          }
        }
      }
      copy_async_commit();
    };
    uint32_t b[4][4][2];
    auto load_next_b = [&](int k0) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int column = column0 + c * 32, r = k0 + g;
        const uint4 low = column < d_out && r < lora_rank ? load_16(unit.b_t + (int64_t)r * d_out + column) : zero_16();
        const uint4 high = column < d_out && r + 8 < lora_rank ? load_16(unit.b_t + (int64_t)(r + 8) * d_out + column) : zero_16();
        b[c][0][0] = low.x, b[c][1][0] = low.y, b[c][2][0] = low.z, b[c][3][0] = low.w;
        b[c][0][1] = high.x, b[c][1][1] = high.y, b[c][2][1] = high.z, b[c][3][1] = high.w;
      }
    };
    auto transpose_b = [&]() {
#pragma unroll
      for (int i = 0; i < 32; i++) b[i / 8][i / 2 % 4][i % 2] = transpose_8x8(b[i / 8][i / 2 % 4][i % 2]);
    };
    load_next_b(0);
    if (!waited) {
      wait_for_previous_kernel();
      waited = true;
    }
    fetch(0);
    fetch(1);
    uint32_t next_a[4];
    load_v<false>(next_a, v, args.v_stride, g, num_rows, 0, lora_rank, t);
    if (one_chunk) transpose_b();
    for (int turn = 0; turn < turns; turn++) {
      float acc[4][4][4] = {};
      for (int k0 = 0; k0 < lora_rank; k0 += 16) {
        uint32_t a[4] = {next_a[0], next_a[1], next_a[2], next_a[3]};
        const bool last = k0 + 16 >= lora_rank;
        load_v<false>(next_a, v, args.v_stride, (last ? turn + 1 : turn) * 16 + g, num_rows, last ? 0 : k0 + 16, lora_rank, t);
        if (!one_chunk) {
          if (turn > 0 || k0 > 0) load_next_b(k0);
          transpose_b();
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
#pragma unroll
          for (int j = 0; j < 4; j++) mma_bf16(acc[c][j], a[0], a[1], a[2], a[3], b[c][j][0], b[c][j][1]);
        }
      }
      copy_async_wait<1>();
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = turn * 16 + half * 8 + g;
        Y* y_row = y_item + (int64_t)row * args.y_stride + column0;
        uint4 sums[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const uint4* from = ring + (turn % 2 * 8 + half * 4 + c) * PIECES * 128 + threadIdx.x - t;
          uint4 pieces[PIECES];
#pragma unroll
          for (int piece = 0; piece < PIECES; piece++) {
            const int at = t * PIECES + piece;
            pieces[piece] = from[at / 4 * 128 + at % 4];
          }
          Vector8<Y> old;
          old.take(pieces);
          float delta[8];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            delta[2 * j] = acc[c][j][2 * half];
            delta[2 * j + 1] = acc[c][j][2 * half + 1];
          }
          if constexpr (D != 0) {
            sums[c] = old.sum(delta);
          } else if (row < num_rows && column0 + c * 32 < d_out) {
            old.store_sum(y_row + c * 32, delta);
          }
        }
        if constexpr (D != 0) {
          rotate_and_store<D>(rope, sums, unit.slice, warp_column / D, d_out / D, unit.item.row_start + row, row < num_rows, t, y_row);
        }
      }
      __syncwarp();
      fetch(turn + 2);
    }
    copy_async_wait<0>();
  }
  if (!waited) wait_for_previous_kernel();
}

KERNEL __launch_bounds__(128) lora_expand_rows8_bf16(bf16* y, const __grid_constant__ ExpandArgs args) { expand_rows8<bf16, 0>(y, args, RopeArgs{}); }
KERNEL __launch_bounds__(128, 3) lora_expand_rows8_f32(float* y, const __grid_constant__ ExpandArgs args) { expand_rows8<float, 0>(y, args, RopeArgs{}); }
KERNEL __launch_bounds__(128, 3) lora_expand_rows64_bf16(bf16* y, const __grid_constant__ ExpandArgs args) { expand_rows64<bf16, 0>(y, args, RopeArgs{}); }
KERNEL __launch_bounds__(128, 3) lora_expand_rows64_f32(float* y, const __grid_constant__ ExpandArgs args) { expand_rows64<float, 0>(y, args, RopeArgs{}); }

// Blocks a multiprocessor as many as spill no register: the driver resizes local memory at a kernel's first launch, and that breaks captures.
#define ROPE_KERNEL(name, function, D, BLOCKS)                                                                                            \
  KERNEL __launch_bounds__(128, BLOCKS) name(bf16* qkv, const __grid_constant__ ExpandArgs args, const __grid_constant__ RopeArgs rope) { \
    function<bf16, D>(qkv, args, rope);                                                                                           \
  }
ROPE_KERNEL(lora_expand_rope_rows8_d64, expand_rows8, 64, 3)
ROPE_KERNEL(lora_expand_rope_rows8_d128, expand_rows8, 128, 3)
ROPE_KERNEL(lora_expand_rope_rows64_d64, expand_rows64, 64, 2)
ROPE_KERNEL(lora_expand_rope_rows64_d128, expand_rows64, 128, 2)

// residual += scaling · v · Bᵀ, then normed = the RMSNorm of the row: what rms_norm.cu would do next. A cluster of blocks has 8 whole rows of an
// item, a block 512 columns of them; the sums of squares go through distributed shared memory. Sums start from the residual, so that it takes no
// registers of its own. With 16 rows at a time B would be read less often, by too few blocks to hide what they wait for.
struct NormArgs {
  float* residual;
  bf16* normed;
  const bf16* weight;
  float eps;
};

#if __CUDA_ARCH__ >= 900
DEVICE void expand_norm(const ExpandArgs& args, const NormArgs& norm) {
  constexpr int ROWS = 8, PARTS = 2;  // rows of a turn; turns of an item
  __shared__ float warp_squares[4][ROWS], squares[2][ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int num_blocks = cluster_size(), hidden = args.slices.d_out[0];
  const int column0 = cluster_rank() * 512 + warp * 128 + t * 8;
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * PARTS;
  int turn = 0;
  for (int work = blockIdx.x / num_blocks; work < total; work += gridDim.x / num_blocks) {
    const LoraItem item = args.items[work / PARTS];
    const int row0 = work % PARTS * ROWS, num_rows = min(ROWS, item.num_rows - row0);
    if (num_rows <= 0) continue;
    const LoraDescriptor* d = item.descriptors == 0 ? nullptr : reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
    const int lora_rank = d == nullptr ? 0 : d->lora_rank[0];
    const bf16* b_t = d == nullptr ? nullptr : d->b_t[0];
    const bf16* v = args.v + ((int64_t)item.row_start + row0) * args.v_stride;
    const int64_t first = ((int64_t)item.row_start + row0 + g) * hidden + column0;
    float acc[4][4][4] = {};
    for (int k0 = 0; k0 == 0 || k0 < lora_rank; k0 += 16) {
      uint4 low[4], high[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int column = column0 + c * 32, r = k0 + g;
        low[c] = load_b(b_t, r, lora_rank, column, hidden);
        high[c] = load_b(b_t, r + 8, lora_rank, column, hidden);
      }
      if (!waited) {
        wait_for_previous_kernel();
        waited = true;
      }
      if (k0 == 0 && g < num_rows) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (column0 + c * 32 < hidden) {
            const float4* from = reinterpret_cast<const float4*>(norm.residual + first + c * 32);
            const float4 a = from[0], b = from[1];
            acc[c][0][0] = a.x, acc[c][0][1] = a.y, acc[c][1][0] = a.z, acc[c][1][1] = a.w;
            acc[c][2][0] = b.x, acc[c][2][1] = b.y, acc[c][3][0] = b.z, acc[c][3][1] = b.w;
          }
        }
      }
      if (lora_rank == 0) break;
      uint32_t a[4];
      load_v<true>(a, v, args.v_stride, g, num_rows, k0, lora_rank, t);
#pragma unroll
      for (int c = 0; c < 4; c++) multiply_rows8(acc[c], a, low[c], high[c]);
    }
    float square = 0.f;
#pragma unroll
    for (int c = 0; c < 4; c++) {
#pragma unroll
      for (int j = 0; j < 4; j++) square += acc[c][j][0] * acc[c][j][0] + acc[c][j][1] * acc[c][j][1];
    }
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (t == 0) warp_squares[warp][g] = square;
    __syncthreads();
    if (threadIdx.x < ROWS) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < 4; w++) sum += warp_squares[w][threadIdx.x];
      squares[turn][threadIdx.x] = sum;
    }
    __syncwarp();
    // Two turns of `squares`: a block that writes the next one may be one barrier ahead of a block that still reads this one.
    cluster_barrier();
    float sum = 0.f;
    for (int block = t; block < num_blocks; block += 4)
      sum += load_in_cluster(address_in_cluster(static_cast<uint32_t>(__cvta_generic_to_shared(&squares[turn][g])), block));
    turn ^= 1;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = rsqrtf(sum / hidden + norm.eps);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      if (g < num_rows && column0 + c * 32 < hidden) {
        const int64_t at = first + c * 32;
        float values[8];
#pragma unroll
        for (int j = 0; j < 4; j++) values[2 * j] = acc[c][j][0], values[2 * j + 1] = acc[c][j][1];
        if (lora_rank > 0) {
          float4* to = reinterpret_cast<float4*>(norm.residual + at);
          to[0] = make_float4(values[0], values[1], values[2], values[3]);
          to[1] = make_float4(values[4], values[5], values[6], values[7]);
        }
        const uint4 weights = load_16(norm.weight + column0 + c * 32);
        const uint32_t w[4] = {weights.x, weights.y, weights.z, weights.w};
        uint32_t out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = pack_bf16(values[2 * j] * inverse * low_bf16(w[j]), values[2 * j + 1] * inverse * high_bf16(w[j]));
        *reinterpret_cast<uint4*>(norm.normed + at) = make_uint4(out[0], out[1], out[2], out[3]);
      }
    }
    __syncwarp();
  }
  if (!waited) wait_for_previous_kernel();
  // The barrier is for whole warps, and the rows and columns above part them.
  __syncwarp();
  // No block leaves while another one reads its sums.
  cluster_barrier();
}
#else
// Elsewhere the launcher does not take it.
DEVICE void expand_norm(const ExpandArgs&, const NormArgs&) {}
#endif

KERNEL __launch_bounds__(128, 3) lora_expand_norm(const __grid_constant__ ExpandArgs args, const __grid_constant__ NormArgs norm) { expand_norm(args, norm); }

// What one adapter adds to gate and up.
struct GatedUnit {
  LoraItem item;
  int ranks[2];
  const bf16* b_t[2];
  const bf16* v[2];

  DEVICE_METHOD GatedUnit(const ExpandArgs& args, int work) {
    item = args.items[work / args.slices.num_tiles];
#pragma unroll
    for (int slice = 0; slice < 2; slice++) ranks[slice] = 0, b_t[slice] = nullptr;
    if (item.descriptors != 0) {
      const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
#pragma unroll
      for (int slice = 0; slice < 2; slice++) {
        ranks[slice] = d->lora_rank[slice];
        b_t[slice] = d->b_t[slice];
      }
    }
    v[0] = args.v + (int64_t)item.row_start * args.v_stride;
    v[1] = v[0] + padded_rank(ranks[0]);
  }
};

// act(gate + Δgate) · (up + Δup) of 8 neighbouring columns.
template <float (*act)(float), int half>
DEVICE uint4 activate(const uint4& gate, const uint4& up, const float (&gate_delta)[4][4], const float (&up_delta)[4][4]) {
  const uint32_t gates[4] = {gate.x, gate.y, gate.z, gate.w}, ups[4] = {up.x, up.y, up.z, up.w};
  uint32_t out[4];
#pragma unroll
  for (int j = 0; j < 4; j++)
    out[j] = pack_bf16(
        act(low_bf16(gates[j]) + gate_delta[j][2 * half]) * (low_bf16(ups[j]) + up_delta[j][2 * half]),
        act(high_bf16(gates[j]) + gate_delta[j][2 * half + 1]) * (high_bf16(ups[j]) + up_delta[j][2 * half + 1]));
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// As `expand_rows8`, but a warp owns 64 columns of gate and the same 64 of up.
template <float (*act)(float)>
DEVICE void expand_gated_rows8(const bf16* gate_up, bf16* y, const ExpandArgs& args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int ffn = args.slices.d_out[0];
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * args.slices.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const GatedUnit unit(args, work);
    const int num_rows = min(8, (int)unit.item.num_rows), max_rank = max(unit.ranks[0], unit.ranks[1]);
    const int column0 = work % args.slices.num_tiles * 256 + warp * 64 + t * 8;
    const int64_t row = (int64_t)unit.item.row_start + g;
    float acc[2][2][4][4] = {};
    uint4 old[2][2];
    for (int k0 = 0; k0 == 0 || k0 < max_rank; k0 += 16) {
      uint4 low[2][2], high[2][2];
#pragma unroll
      for (int slice = 0; slice < 2; slice++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int column = column0 + c * 32, r = k0 + g;
          const bf16* from = unit.b_t[slice] + (int64_t)r * ffn + column;
          low[slice][c] = column < ffn && r < unit.ranks[slice] ? load_16(from) : zero_16();
          high[slice][c] = column < ffn && r + 8 < unit.ranks[slice] ? load_16(from + 8 * (int64_t)ffn) : zero_16();
        }
      }
      if (!waited) {
        wait_for_previous_kernel();
        waited = true;
      }
      if (k0 == 0) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const bool valid = g < num_rows && column0 + c * 32 < ffn;
          const bf16* from = gate_up + row * 2 * ffn + column0 + c * 32;
          old[0][c] = valid ? load_16(from) : zero_16();
          old[1][c] = valid ? load_16(from + ffn) : zero_16();
        }
      }
      if (max_rank == 0) break;
      uint32_t a[2][4];
#pragma unroll
      for (int slice = 0; slice < 2; slice++) load_v<true>(a[slice], unit.v[slice], args.v_stride, g, num_rows, k0, unit.ranks[slice], t);
#pragma unroll
      for (int slice = 0; slice < 2; slice++) {
#pragma unroll
        for (int c = 0; c < 2; c++) multiply_rows8(acc[slice][c], a[slice], low[slice][c], high[slice][c]);
      }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if (g < num_rows && column0 + c * 32 < ffn)
        *reinterpret_cast<uint4*>(y + row * ffn + column0 + c * 32) = activate<act, 0>(old[0][c], old[1][c], acc[0][c], acc[1][c]);
    }
  }
  if (!waited) wait_for_previous_kernel();
}

// As `expand_rows64`.
template <float (*act)(float)>
DEVICE void expand_gated_rows64(const bf16* gate_up, bf16* y, const ExpandArgs& args) {
  DYNAMIC_SHARED(uint4, ring);  // [2][half][c][gate, up][128]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int ffn = args.slices.d_out[0];
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*args.num_items * args.slices.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const GatedUnit unit(args, work);
    const int num_rows = unit.item.num_rows, turns = (num_rows + 15) / 16, max_rank = max(unit.ranks[0], unit.ranks[1]);
    const bool one_chunk = max_rank <= 16;
    const int column0 = work % args.slices.num_tiles * 256 + warp * 64 + t * 8;
    auto fetch = [&](int turn) {
      if (turn < turns) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = turn * 16 + half * 8 + g;
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const bool valid = row < num_rows && column0 + c * 32 < ffn;
            const bf16* from = valid ? gate_up + (int64_t)(unit.item.row_start + row) * 2 * ffn + column0 + c * 32 : gate_up;
            uint4* to = ring + (turn % 2 * 8 + half * 4 + c * 2) * 128 + threadIdx.x;
            copy_async_16(to, from, valid);
            copy_async_16(to + 128, from + ffn, valid);
          }
        }
      }
      copy_async_commit();
    };
    uint32_t b[2][2][4][2];
    auto load_next_b = [&](int k0) {
#pragma unroll
      for (int slice = 0; slice < 2; slice++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int column = column0 + c * 32, r = k0 + g;
          const bf16* from = unit.b_t[slice] + (int64_t)r * ffn + column;
          const uint4 low = column < ffn && r < unit.ranks[slice] ? load_16(from) : zero_16();
          const uint4 high = column < ffn && r + 8 < unit.ranks[slice] ? load_16(from + 8 * (int64_t)ffn) : zero_16();
          uint32_t(&to)[4][2] = b[slice][c];
          to[0][0] = low.x, to[1][0] = low.y, to[2][0] = low.z, to[3][0] = low.w;
          to[0][1] = high.x, to[1][1] = high.y, to[2][1] = high.z, to[3][1] = high.w;
        }
      }
    };
    auto transpose_b = [&]() {
#pragma unroll
      for (int i = 0; i < 16; i++) {
        uint32_t(&pair)[2] = b[i / 8][i / 4 % 2][i % 4];
        pair[0] = transpose_8x8(pair[0]);
        pair[1] = transpose_8x8(pair[1]);
      }
    };
    load_next_b(0);
    if (!waited) {
      wait_for_previous_kernel();
      waited = true;
    }
    fetch(0);
    fetch(1);
    uint32_t next_a[2][4];
    auto load_next = [&](int turn, int k0) {
#pragma unroll
      for (int slice = 0; slice < 2; slice++)
        load_v<false>(next_a[slice], unit.v[slice], args.v_stride, turn * 16 + g, num_rows, k0, unit.ranks[slice], t);
    };
    load_next(0, 0);
    if (one_chunk) transpose_b();
    for (int turn = 0; turn < turns; turn++) {
      const int row0 = turn * 16;
      float acc[2][2][4][4] = {};
      for (int k0 = 0; k0 < max_rank; k0 += 16) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 4][i % 4] = next_a[i / 4][i % 4];
        const bool last = k0 + 16 >= max_rank;
        load_next(last ? turn + 1 : turn, last ? 0 : k0 + 16);
        if (!one_chunk) {
          if (turn > 0 || k0 > 0) load_next_b(k0);
          transpose_b();
        }
#pragma unroll
        for (int slice = 0; slice < 2; slice++) {
#pragma unroll
          for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int j = 0; j < 4; j++)
              mma_bf16(acc[slice][c][j], a[slice][0], a[slice][1], a[slice][2], a[slice][3], b[slice][c][j][0], b[slice][c][j][1]);
          }
        }
      }
      copy_async_wait<1>();
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row0 + half * 8 + g;
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const uint4* from = ring + (turn % 2 * 8 + half * 4 + c * 2) * 128 + threadIdx.x;
          if (row < num_rows && column0 + c * 32 < ffn) {
            bf16* to = y + (int64_t)(unit.item.row_start + row) * ffn + column0 + c * 32;
            *reinterpret_cast<uint4*>(to) =
                half == 0 ? activate<act, 0>(from[0], from[128], acc[0][c], acc[1][c]) : activate<act, 1>(from[0], from[128], acc[0][c], acc[1][c]);
          }
        }
      }
      fetch(turn + 2);
    }
    copy_async_wait<0>();
  }
  if (!waited) wait_for_previous_kernel();
}

#define GATED_KERNEL(name, function, act) \
  KERNEL __launch_bounds__(128, 3) name(const bf16* gate_up, bf16* y, const __grid_constant__ ExpandArgs args) { function<act>(gate_up, y, args); }
GATED_KERNEL(lora_expand_silu_rows8, expand_gated_rows8, silu)
GATED_KERNEL(lora_expand_silu_rows64, expand_gated_rows64, silu)
GATED_KERNEL(lora_expand_gelu_rows8, expand_gated_rows8, gelu_tanh)
GATED_KERNEL(lora_expand_gelu_rows64, expand_gated_rows64, gelu_tanh)

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
    int v_start = 0, y_start = 0;
    for (int slice = 0; slice < 3; slice++) {
      const int d_out = args.slices.d_out[slice], lora_rank = d->lora_rank[slice];
      if (lora_rank > 0) {
        for (int64_t i = threadIdx.x; i < (int64_t)item.num_rows * d_out; i += blockDim.x) {
          const int64_t row = item.row_start + i / d_out;
          const int column = (int)(i % d_out);
          float sum = 0.f;
          for (int r = 0; r < lora_rank; r++)
            sum += __bfloat162float(args.v[row * args.v_stride + v_start + r]) * __bfloat162float(d->b_t[slice][(int64_t)r * d_out + column]);
          Y* to = y + row * args.y_stride + y_start + column;
          from_f32(to, to_f32(*to) + sum);
        }
      }
      v_start += padded_rank(lora_rank);
      y_start += d_out;
    }
  }
}

KERNEL __launch_bounds__(128) lora_expand_naive_bf16(bf16* y, const __grid_constant__ ExpandArgs args) { expand_naive<bf16>(y, args); }
KERNEL __launch_bounds__(128) lora_expand_naive_f32(float* y, const __grid_constant__ ExpandArgs args) { expand_naive<float>(y, args); }
