// activation.cu   y[t,j] = act(gate[t,j]) · up[t,j]   bf16 in, f32 arithmetic, bf16 out.   Source: arXiv:2002.05202
// Shapes  gate_up [rows, 2·ffn] (gate, then up); y [rows, ffn]
// Launch  grid (ceil(rows · ffn / 8 / 256)), block 256; 8 values a thread
// Cost    bytes 6 · rows · ffn: bandwidth is the roof
// Limits  ffn % 8 == 0
#include "common.cuh"

template <float (*act)(float)>
DEVICE void gated(const bf16* gate_up, bf16* y, int64_t num_vectors, int ffn) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t vector = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (vector >= num_vectors) return;
  const int per_row = ffn / 8;
  const int64_t row = vector / per_row;
  const int column = (int)(vector % per_row) * 8;
  const uint4 gate = load_16(gate_up + row * 2 * ffn + column);
  const uint4 up = load_16(gate_up + row * 2 * ffn + ffn + column);
  const uint32_t g[4] = {gate.x, gate.y, gate.z, gate.w};
  const uint32_t u[4] = {up.x, up.y, up.z, up.w};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = pack_bf16(act(low_bf16(g[i])) * low_bf16(u[i]), act(high_bf16(g[i])) * high_bf16(u[i]));
  *reinterpret_cast<uint4*>(y + row * ffn + column) = make_uint4(out[0], out[1], out[2], out[3]);
}

KERNEL __launch_bounds__(256) silu_mul(const bf16* gate_up, bf16* y, int64_t num_vectors, int ffn) { gated<silu>(gate_up, y, num_vectors, ffn); }
KERNEL __launch_bounds__(256) gelu_tanh_mul(const bf16* gate_up, bf16* y, int64_t num_vectors, int ffn) { gated<gelu_tanh>(gate_up, y, num_vectors, ffn); }
