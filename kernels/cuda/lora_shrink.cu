// lora_shrink.cu   v[s,t,:] = x[t, part s] · A[adapter(t), part s]ᵀ   bf16 in, f32 sums, f32 out.   Source: arXiv:2310.18547
// Shapes  x [T, d_in]; A [rank_total, d_in] by descriptor (the stack of q, k, v, or of gate, up); items [*num_items] of <= 8·tiles rows and
//         16 ranks each; v [num_splits, split_rows, v_stride] f32
// Layout  row-major, rows of x and A 16-byte aligned; split s covers columns [s·k_per_split, (s+1)·k_per_split); lora_expand adds the splits up,
//         so no atomics are needed and a row's bits do not depend on its neighbours. Rows in no item are not touched
// Launch  grid any (blocks stride over items · num_splits; at least one a multiprocessor), block 128
// Cost    flops 2·d_in·Σ rows·rank_total; bytes 2·d_in·Σ(rows + rank_total) + 4·num_splits·Σ rows·rank_total. With one row an adapter about
//         1 flop a byte: bandwidth is the roof, and the kernel's whole design is to have every byte of A in flight at once
// Limits  d_in % 8 == 0; k_per_split % 1024 == 0; rank_total <= v_stride
// Variants naive: one warp a (row, rank), the yardstick; rows8: up to 8 rows an item (decode); rows64: up to 64 rows an item (prefill)
#include "common.cuh"

// 16 ranks x 8 rows per instruction: A is the left operand, x the right one. Each of 4 warps owns 256 of 1024 columns and keeps its part of A
// in registers, loaded straight from memory with permuted k (see common.cuh): 4 chunks of 64 columns, 2 rows and 2 x 16 bytes a lane each.
template <int num_tiles>
DEVICE void shrink(
    const bf16* x, float* v, const LoraItem* items, const uint32_t* num_items, uint32_t descriptor_offset, int d_in, int k_per_split, int num_splits,
    int64_t split_rows, int v_stride) {
  __shared__ float partial[4][num_tiles][8][16 + 1];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  allow_next_kernel();
  bool waited = false;
  const int total = (int)*num_items * num_splits;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const LoraItem item = items[work / num_splits];
    const int split = work % num_splits;
    const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + descriptor_offset);
    const int rank0 = item.rank_tile * 16;
    const int num_ranks = min(16, (int)d->rank_total - rank0);
    if (num_ranks <= 0) continue;
    const bf16* a = d->a + (int64_t)rank0 * d_in;
    float acc[num_tiles][4] = {};
    const int k_end = min(d_in, (split + 1) * k_per_split);
    for (int k0 = split * k_per_split + warp * 256; k0 < k_end; k0 += 1024) {
      uint4 a_low[8], a_high[8];
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const int k = k0 + c * 32 + t * 8;
        a_low[c] = k < k_end && g < num_ranks ? load_stream_16(a + (int64_t)g * d_in + k) : zero_16();
        a_high[c] = k < k_end && g + 8 < num_ranks ? load_stream_16(a + (int64_t)(g + 8) * d_in + k) : zero_16();
      }
      if (!waited) {
        wait_for_previous_kernel();
        waited = true;
      }
#pragma unroll
      for (int tile = 0; tile < num_tiles; tile++) {
        if (tile * 8 < item.num_rows) {
          const int row = tile * 8 + g;
          const bf16* x_row = x + (int64_t)(item.row_start + row) * d_in;
          uint4 xs[8];
#pragma unroll
          for (int c = 0; c < 8; c++) {
            const int k = k0 + c * 32 + t * 8;
            xs[c] = k < k_end && row < item.num_rows ? load_16(x_row + k) : zero_16();
          }
#pragma unroll
          for (int c = 0; c < 8; c++) {
            mma_bf16(acc[tile], a_low[c].x, a_high[c].x, a_low[c].y, a_high[c].y, xs[c].x, xs[c].y);
            mma_bf16(acc[tile], a_low[c].z, a_high[c].z, a_low[c].w, a_high[c].w, xs[c].z, xs[c].w);
          }
        }
      }
    }
    if (!waited) {
      wait_for_previous_kernel();
      waited = true;
    }
    // Adds the four warps' columns, in their order. acc: (rank g, row 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma unroll
    for (int tile = 0; tile < num_tiles; tile++) {
      if (tile * 8 < item.num_rows) {
        partial[warp][tile][2 * t][g] = acc[tile][0];
        partial[warp][tile][2 * t + 1][g] = acc[tile][1];
        partial[warp][tile][2 * t][g + 8] = acc[tile][2];
        partial[warp][tile][2 * t + 1][g + 8] = acc[tile][3];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < item.num_rows * 16; i += 128) {
      const int row = i / 16, rank = i % 16;
      if (rank < num_ranks) {
        float sum = partial[0][row / 8][row % 8][rank];
#pragma unroll
        for (int w = 1; w < 4; w++) sum += partial[w][row / 8][row % 8][rank];
        v[(split * split_rows + item.row_start + row) * v_stride + rank0 + rank] = sum;
      }
    }
    __syncthreads();
  }
  if (!waited) wait_for_previous_kernel();
}

KERNEL __launch_bounds__(128) lora_shrink_rows8(
    const bf16* x, float* v, const LoraItem* items, const uint32_t* num_items, uint32_t descriptor_offset, int d_in, int k_per_split, int num_splits,
    int64_t split_rows, int v_stride) {
  shrink<1>(x, v, items, num_items, descriptor_offset, d_in, k_per_split, num_splits, split_rows, v_stride);
}

KERNEL __launch_bounds__(128) lora_shrink_rows64(
    const bf16* x, float* v, const LoraItem* items, const uint32_t* num_items, uint32_t descriptor_offset, int d_in, int k_per_split, int num_splits,
    int64_t split_rows, int v_stride) {
  shrink<8>(x, v, items, num_items, descriptor_offset, d_in, k_per_split, num_splits, split_rows, v_stride);
}

// One warp a (row, rank) and one split: right, and slow.
KERNEL __launch_bounds__(128) lora_shrink_naive(
    const bf16* x, float* v, const LoraItem* items, const uint32_t* num_items, uint32_t descriptor_offset, int d_in, int k_per_split, int num_splits,
    int64_t split_rows, int v_stride) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t work = blockIdx.x; work < *num_items; work += gridDim.x) {
    const LoraItem item = items[work];
    const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + descriptor_offset);
    const int rank0 = item.rank_tile * 16;
    const int num_ranks = min(16, (int)d->rank_total - rank0);
    for (int pair = warp; pair < item.num_rows * num_ranks; pair += 4) {
      const int64_t row = item.row_start + pair / num_ranks;
      const int rank = rank0 + pair % num_ranks;
      for (int split = 0; split < num_splits; split++) {
        float sum = 0.f;
        for (int k = split * k_per_split + lane; k < min(d_in, (split + 1) * k_per_split); k += 32)
          sum += __bfloat162float(x[row * d_in + k]) * __bfloat162float(d->a[(int64_t)rank * d_in + k]);
        sum = warp_sum(sum);
        if (lane == 0) v[(split * split_rows + row) * v_stride + rank] = sum;
      }
    }
  }
}
