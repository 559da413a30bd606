// skinny_gemm.cu   y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias), overwriting or added to   bf16 in, f32 sums, bf16 or f32 out
// Shapes  x [m, k]; w [n, k]; bias [n] in y's dtype or null; y [m, n]
// Layout  row-major, rows of x and w 16-byte aligned
// Launch  grid (ceil(n / 16)), block 256; a block makes 16 columns of y, its 8 warps take 256 of every 2048 columns of w
// Cost    flops 2·m·n·k; bytes 2·n·k + (x again for each block, from L2: m/16 of that): bandwidth is the roof for few rows
// Limits  k % 8 == 0; m <= 8 · tiles
// Method  w is the left tensor-core operand and comes straight from memory in 16-byte pieces with permuted k (see common.cuh): nothing passes
//         through shared memory, and the first pieces are asked for before the kernel before this one has ended. gemm.rs takes it where it
//         measures faster than cuBLASLt
#include "common.cuh"

static constexpr int WARPS = 8;

DEVICE void put(bf16* y, float sum, const bf16* bias, int column, bool) { *y = __float2bfloat16_rn(bias == nullptr ? sum : sum + __bfloat162float(bias[column])); }
DEVICE void put(float* y, float sum, const float* bias, int column, bool add) {
  if (bias != nullptr) sum += bias[column];
  *y = add ? *y + sum : sum;
}

template <typename Y, int tiles>
DEVICE void skinny_gemm(const bf16* x, const bf16* w, const Y* bias, Y* y, int m, int n, int k, int add) {
  __shared__ float partial[WARPS][8 * tiles][16 + 1];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int n0 = blockIdx.x * 16;
  const bool low_valid = n0 + g < n, high_valid = n0 + g + 8 < n;
  const bf16* w_low = w + (int64_t)(n0 + g) * k;
  const bf16* w_high = w_low + 8 * (int64_t)k;
  float acc[tiles][4] = {};
  bool waited = false;
  for (int k0 = warp * 256; k0 < k; k0 += WARPS * 256) {
    uint4 low[8], high[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int column = k0 + c * 32 + t * 8;
      low[c] = column < k && low_valid ? load_stream_16(w_low + column) : zero_16();
      high[c] = column < k && high_valid ? load_stream_16(w_high + column) : zero_16();
    }
    if (!waited) {
      wait_for_previous_kernel();
      // Not before: x is complete when the next kernel starts, see `x_is_ready` of lora_shrink.cu.
      allow_next_kernel();
      waited = true;
    }
#pragma unroll
    for (int tile = 0; tile < tiles; tile++) {
      if (tile * 8 < m) {
        const int row = tile * 8 + g;
        const bf16* from = x + (int64_t)row * k;
        uint4 xs[8];
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const int column = k0 + c * 32 + t * 8;
          xs[c] = column < k && row < m ? load_16(from + column) : zero_16();
        }
#pragma unroll
        for (int c = 0; c < 8; c++) {
          mma_bf16(acc[tile], low[c].x, high[c].x, low[c].y, high[c].y, xs[c].x, xs[c].y);
          mma_bf16(acc[tile], low[c].z, high[c].z, low[c].w, high[c].w, xs[c].z, xs[c].w);
        }
      }
    }
  }
  if (!waited) wait_for_previous_kernel();
  // acc: (column g, row 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); the warps' parts of k are added in their order.
#pragma unroll
  for (int tile = 0; tile < tiles; tile++) {
    partial[warp][tile * 8 + 2 * t][g] = acc[tile][0];
    partial[warp][tile * 8 + 2 * t + 1][g] = acc[tile][1];
    partial[warp][tile * 8 + 2 * t][g + 8] = acc[tile][2];
    partial[warp][tile * 8 + 2 * t + 1][g + 8] = acc[tile][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < m * 16; i += WARPS * 32) {
    const int row = i / 16, column = n0 + i % 16;
    if (column < n) {
      float sum = partial[0][row][i % 16];
#pragma unroll
      for (int other = 1; other < WARPS; other++) sum += partial[other][row][i % 16];
      put(y + (int64_t)row * n + column, sum, bias, column, add != 0);
    }
  }
}

#define SKINNY_KERNEL(name, Y, tiles) \
  KERNEL __launch_bounds__(WARPS * 32, 2) name(const bf16* x, const bf16* w, const Y* bias, Y* y, int m, int n, int k, int add) { skinny_gemm<Y, tiles>(x, w, bias, y, m, n, k, add); }
SKINNY_KERNEL(skinny_gemm_rows8_bf16, bf16, 1)
SKINNY_KERNEL(skinny_gemm_rows16_bf16, bf16, 2)
SKINNY_KERNEL(skinny_gemm_rows32_bf16, bf16, 4)
SKINNY_KERNEL(skinny_gemm_rows8_f32, float, 1)
SKINNY_KERNEL(skinny_gemm_rows16_f32, float, 2)
SKINNY_KERNEL(skinny_gemm_rows32_f32, float, 4)
