// lora_shrink.cu   v[t,:] = scaling · x[t,:] · A[adapter(t)]ᵀ   bf16 in, f32 sums, bf16 out.   Source: arXiv:2310.18547
// Shapes  x [T, d_in]; A [rank_total, d_in] by descriptor (the stack of q, k, v, or of gate, up); items [*num_items] of <= 8·tiles rows and
//         16 ranks each; v [T, v_stride] bf16, each slice's ranks from the next multiple of 16 on; partial [num_splits, split_rows, v_stride] f32
//         and counters [*num_items] u32 (all 0, left 0) when num_splits > 1
// Layout  row-major, rows of x and A 16-byte aligned; split s covers columns [s·k_per_split, (s+1)·k_per_split); the last block of an item to
//         finish adds the splits up in their order, so that a row's bits do not depend on its neighbours. Rows in no item are not touched
// Launch  grid any (blocks stride over items · num_splits; at least one a multiprocessor), block 128
// Cost    flops 2·d_in·Σ rows·rank_total; bytes 2·d_in·Σ(rows + rank_total) + 8·num_splits·Σ rows·rank_total. With one row an adapter about
//         1 flop a byte: bandwidth is the roof, and the kernel's whole design is to have every byte of A in flight at once
// Limits  d_in % 8 == 0; k_per_split % 1024 == 0; the slices' ranks, each rounded up to 16, add up to at most v_stride
// Variants naive: one warp a (row, rank), the yardstick; rows8, rows16: up to so many rows an item (decode); rows64: up to 64 (prefill)
// Beside   x_is_ready: the kernel before this one is a GEMM over the same x that let this one start only after it had waited for x itself. Then
//          nothing here waits for the GEMM, and A is read beside the weights
#include "common.cuh"

struct ShrinkArgs {
  const bf16* x;
  bf16* v;
  float* partial;
  uint32_t* counters;
  const LoraItem* items;
  const uint32_t* num_items;
  uint32_t descriptor_offset;
  int d_in;
  int k_per_split;
  int num_splits;
  int64_t split_rows;
  int v_stride;
  int x_is_ready;
};

// Stores the sum of a rank of the stack where the expand looks for it.
DEVICE void store_sum(const ShrinkArgs& args, const LoraDescriptor* d, int64_t row, int rank, float sum) {
  int place = 0, slice = 0;
  while (slice < 2 && rank >= d->lora_rank[slice]) {
    place += (d->lora_rank[slice] + 15) & ~15;
    rank -= d->lora_rank[slice];
    slice++;
  }
  args.v[row * args.v_stride + place + rank] = __float2bfloat16_rn(d->scaling[slice] * sum);
}

// A sum over the splits in their order, up to 16 of them asked for at once.
template <int at_once>
DEVICE float sum_splits(const volatile float* from, int num_splits, int64_t step) {
  float sum = 0.f;
  for (int s0 = 0; s0 < num_splits; s0 += at_once) {
    float parts[at_once];
#pragma unroll
    for (int s = 0; s < at_once; s++) parts[s] = s0 + s < num_splits ? from[(s0 + s) * step] : 0.f;
#pragma unroll
    for (int s = 0; s < at_once; s++) sum += parts[s];
  }
  return sum;
}

// 16 ranks x 8 rows per instruction: A is the left operand, x the right one. Each of 4 warps owns 256 of 1024 columns and keeps its part of A
// in registers, loaded straight from memory with permuted k (see common.cuh): 4 chunks of 64 columns, 2 rows and 2 x 16 bytes a lane each.
template <int num_tiles>
DEVICE void shrink(const ShrinkArgs& args) {
  __shared__ float partial[4][num_tiles][8][16 + 1];
  __shared__ bool is_last;
  const int d_in = args.d_in, num_splits = args.num_splits;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  allow_next_kernel();
  bool waited = args.x_is_ready;
  const int total = (int)*args.num_items * num_splits;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const LoraItem item = args.items[work / num_splits];
    const int split = work % num_splits;
    const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
    const int rank0 = item.rank_tile * 16;
    const int num_ranks = min(16, (int)d->rank_total - rank0);
    if (num_ranks <= 0) continue;
    const bf16* a = d->a + (int64_t)rank0 * d_in;
    float acc[num_tiles][4] = {};
    const int k_end = min(d_in, (split + 1) * args.k_per_split);
    for (int k0 = split * args.k_per_split + warp * 256; k0 < k_end; k0 += 1024) {
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
          const bf16* x_row = args.x + (int64_t)(item.row_start + row) * d_in;
          uint4 xs[8];
#pragma unroll
          for (int c = 0; c < 8; c++) {
            const int k = k0 + c * 32 + t * 8;
            xs[c] = k < k_end && row < item.num_rows ? (args.x_is_ready ? load_fresh_16(x_row + k) : load_16(x_row + k)) : zero_16();
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
        if (num_splits == 1)
          store_sum(args, d, item.row_start + row, rank0 + rank, sum);
        else
          args.partial[(split * args.split_rows + item.row_start + row) * args.v_stride + rank0 + rank] = sum;
      }
    }
    if (num_splits > 1) {
      // The block's stores come before its arrival, and the other blocks' arrivals before the last one's loads.
      uint32_t* counter = args.counters + work / num_splits;
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(counter, 1u) == (uint32_t)num_splits - 1;
        if (is_last) *counter = 0;
        __threadfence();
      }
      __syncthreads();
      if (is_last) {
        const int64_t step = args.split_rows * args.v_stride;
        constexpr int AT_ONCE = num_tiles == 1 ? 1 : num_tiles == 2 ? 2 : 4;
        for (int first = threadIdx.x; first < item.num_rows * 16; first += 128 * AT_ONCE) {
          float sums[AT_ONCE];
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) {
            const int row = (first + i * 128) / 16, rank = first % 16;
            const float* from = args.partial + ((int64_t)item.row_start + row) * args.v_stride + rank0 + rank;
            const int splits = row < item.num_rows && rank < num_ranks ? num_splits : 0;
            sums[i] = num_splits <= 4 ? sum_splits<4>(from, splits, step) : sum_splits<16>(from, splits, step);
          }
#pragma unroll
          for (int i = 0; i < AT_ONCE; i++) {
            const int row = (first + i * 128) / 16, rank = first % 16;
            if (row < item.num_rows && rank < num_ranks) store_sum(args, d, item.row_start + row, rank0 + rank, sums[i]);
          }
        }
      }
    }
    __syncthreads();
  }
  // With x ready one block waits, so that the end of this kernel still is that of the one before it; the others make room.
  if (args.x_is_ready ? blockIdx.x == 0 : !waited) wait_for_previous_kernel();
}

KERNEL __launch_bounds__(128, 4) lora_shrink_rows8(const __grid_constant__ ShrinkArgs args) { shrink<1>(args); }
KERNEL __launch_bounds__(128, 3) lora_shrink_rows16(const __grid_constant__ ShrinkArgs args) { shrink<2>(args); }
KERNEL __launch_bounds__(128, 2) lora_shrink_rows64(const __grid_constant__ ShrinkArgs args) { shrink<8>(args); }

// One warp a (row, rank): right, and slow.
KERNEL __launch_bounds__(128) lora_shrink_naive(const __grid_constant__ ShrinkArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t work = blockIdx.x; work < *args.num_items; work += gridDim.x) {
    const LoraItem item = args.items[work];
    const LoraDescriptor* d = reinterpret_cast<const LoraDescriptor*>(item.descriptors + args.descriptor_offset);
    const int rank0 = item.rank_tile * 16;
    const int num_ranks = min(16, (int)d->rank_total - rank0);
    for (int pair = warp; pair < item.num_rows * num_ranks; pair += 4) {
      const int64_t row = item.row_start + pair / num_ranks;
      const int rank = rank0 + pair % num_ranks;
      float sum = 0.f;
      for (int k = lane; k < args.d_in; k += 32)
        sum += __bfloat162float(args.x[row * args.d_in + k]) * __bfloat162float(d->a[(int64_t)rank * args.d_in + k]);
      sum = warp_sum(sum);
      if (lane == 0) store_sum(args, d, row, rank, sum);
    }
  }
}
