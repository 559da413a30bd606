// rms_norm.cu   h = residual[row] (+ x[row], written back); y = h / sqrt(mean(h²) + eps) · weight   Source: arXiv:1910.07467
// Shapes  residual [rows, hidden] f32; x [rows, hidden] bf16 or null; weight [hidden] bf16; y [rows_out, hidden] bf16
//         rows [rows_out] u32 or null: y[i] is the norm of residual[rows[i]] (gather of the rows to sample, fused); x is null then
// Layout  row-major, rows 16-byte aligned
// Launch  grid (rows_out), block 256
// Cost    bytes rows · hidden · (4 + 2), + 4 + 2 with x; flops 4 · rows · hidden: bandwidth is the roof
// Limits  hidden % 4 == 0; hidden <= 16384
#include "common.cuh"

static constexpr int NORM_THREADS = 256;
static constexpr int NORM_MAX_VECTORS = 16;  // float4 per thread

template <bool add>
DEVICE void rms_norm_row(float* residual, const bf16* x, const bf16* weight, bf16* y, const uint32_t* rows, int hidden, float eps) {
  __shared__ float partial[NORM_THREADS / 32];
  const int num_vectors = hidden / 4;
  // The weight is not written by any kernel: it is fetched while the kernel before this one still runs.
  uint2 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int v = threadIdx.x + i * NORM_THREADS;
    if (v < num_vectors) w[i] = reinterpret_cast<const uint2*>(weight)[v];
  }
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row_in = rows == nullptr ? blockIdx.x : rows[blockIdx.x];
  float4* h = reinterpret_cast<float4*>(residual + row_in * hidden);
  float4 values[NORM_MAX_VECTORS];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < NORM_MAX_VECTORS; i++) {
    const int v = threadIdx.x + i * NORM_THREADS;
    if (v < num_vectors) {
      float4 value = h[v];
      if (add) {
        const uint2 delta = reinterpret_cast<const uint2*>(x + row_in * hidden)[v];
        value.x += low_bf16(delta.x);
        value.y += high_bf16(delta.x);
        value.z += low_bf16(delta.y);
        value.w += high_bf16(delta.y);
        h[v] = value;
      }
      values[i] = value;
      sum += value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
    }
  }
  const float inverse = rsqrtf(block_sum<NORM_THREADS / 32>(sum, partial) / hidden + eps);
#pragma unroll
  for (int i = 0; i < NORM_MAX_VECTORS; i++) {
    const int v = threadIdx.x + i * NORM_THREADS;
    if (v < num_vectors) {
      const uint2 g = i < 4 ? w[i & 3] : reinterpret_cast<const uint2*>(weight)[v];
      const float4 value = values[i];
      reinterpret_cast<uint2*>(y + (int64_t)blockIdx.x * hidden)[v] = make_uint2(
          pack_bf16(value.x * inverse * low_bf16(g.x), value.y * inverse * high_bf16(g.x)),
          pack_bf16(value.z * inverse * low_bf16(g.y), value.w * inverse * high_bf16(g.y)));
    }
  }
}

KERNEL __launch_bounds__(NORM_THREADS) rms_norm(float* residual, const bf16* weight, bf16* y, const uint32_t* rows, int hidden, float eps) {
  rms_norm_row<false>(residual, nullptr, weight, y, rows, hidden, eps);
}

KERNEL __launch_bounds__(NORM_THREADS) add_rms_norm(float* residual, const bf16* x, const bf16* weight, bf16* y, int hidden, float eps) {
  rms_norm_row<true>(residual, x, weight, y, nullptr, hidden, eps);
}
