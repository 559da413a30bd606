// rope_kv.cu   One pass over q, k, v: norm of each q and k head (optional), rotary embedding, K and V to the paged cache.
//              Source: arXiv:2104.09864 (halves layout), arXiv:2309.06180 (paged cache)
// Shapes  qkv [rows, (H + 2·KV)·D] bf16, q rotated in place; positions [rows]; kv_slots [rows], 0xffffffff writes nothing;
//         cos_sin [max_position, D/2] pairs f32; q_norm, k_norm [D] bf16 or null; k_cache, v_cache [num_blocks, KV, block_size, D] bf16, blocks
//         block_stride apart
// Launch  one warp a head: grid (rows, ceil((H + 2·KV) / 4)), block 128
// Cost    bytes 2 · rows · D · (2·H + 4·KV); bandwidth is the roof
// Limits  D % 4 == 0; D <= 256; positions below max_position (clamped)
#include "common.cuh"

KERNEL __launch_bounds__(128) rope_kv(
    bf16* qkv, const uint32_t* positions, const uint32_t* kv_slots, const float2* cos_sin, const bf16* q_norm, const bf16* k_norm, bf16* k_cache,
    bf16* v_cache, int64_t block_stride, int num_heads, int num_kv_heads, int head_dim, int block_size, uint32_t max_position, float eps) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int head = blockIdx.y * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (head >= num_heads + 2 * num_kv_heads) return;
  const int half = head_dim / 2;
  bf16* from = qkv + (row * (num_heads + 2 * num_kv_heads) + head) * head_dim;
  const uint32_t slot = kv_slots[row];
  const bool is_query = head < num_heads;
  const bool is_value = head >= num_heads + num_kv_heads;
  if (!is_query && slot == 0xffffffffu) return;
  bf16* to = from;
  if (!is_query) {
    const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
    to = (is_value ? v_cache : k_cache) + slot / block_size * block_stride + (kv_head * block_size + slot % block_size) * head_dim;
  }
  // Pairs (i, i + D/2); a lane holds neighbouring pairs i, i+1, at most two such couples (D = 256).
  uint32_t low[2], high[2];
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int i = lane * 2 + c * 64;
    if (i < half) {
      low[c] = *reinterpret_cast<const uint32_t*>(from + i);
      high[c] = *reinterpret_cast<const uint32_t*>(from + half + i);
    }
  }
  if (is_value) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int i = lane * 2 + c * 64;
      if (i < half) {
        *reinterpret_cast<uint32_t*>(to + i) = low[c];
        *reinterpret_cast<uint32_t*>(to + half + i) = high[c];
      }
    }
    return;
  }
  const bf16* norm = is_query ? q_norm : k_norm;
  float inverse = 1.f;
  if (norm != nullptr) {
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if (lane * 2 + c * 64 < half) {
        const float a = low_bf16(low[c]), b = high_bf16(low[c]), d = low_bf16(high[c]), e = high_bf16(high[c]);
        sum += a * a + b * b + d * d + e * e;
      }
    }
    inverse = rsqrtf(warp_sum(sum) / head_dim + eps);
  }
  uint32_t position = positions[row];
  if (position >= max_position) position = max_position - 1;
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int i = lane * 2 + c * 64;
    if (i < half) {
      float x0 = low_bf16(low[c]), x1 = high_bf16(low[c]), y0 = low_bf16(high[c]), y1 = high_bf16(high[c]);
      if (norm != nullptr) {
        const uint32_t n0 = *reinterpret_cast<const uint32_t*>(norm + i), n1 = *reinterpret_cast<const uint32_t*>(norm + half + i);
        x0 *= inverse * low_bf16(n0);
        x1 *= inverse * high_bf16(n0);
        y0 *= inverse * low_bf16(n1);
        y1 *= inverse * high_bf16(n1);
      }
      const float4 rotation = *reinterpret_cast<const float4*>(cos_sin + (int64_t)position * half + i);
      *reinterpret_cast<uint32_t*>(to + i) = pack_bf16(x0 * rotation.x - y0 * rotation.y, x1 * rotation.z - y1 * rotation.w);
      *reinterpret_cast<uint32_t*>(to + half + i) = pack_bf16(y0 * rotation.x + x0 * rotation.y, y1 * rotation.z + x1 * rotation.w);
    }
  }
}
