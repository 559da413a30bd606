// embedding.cu   x[t,:] = table[token(t),:]   bf16 in, f32 out.   Source: PEFT's lora.Embedding
//                rows with an adapter: x = scale ⊙ (row + scaling · A[:,token(t)]ᵀ · Bᵀ) + bias; the row is the adapter's own of that token, if it
//                brings one, else of the table that it brings whole, else the base model's
// Shapes  table [vocab, hidden]; token_sources [rows] u32; adapters [rows] address of an EmbeddingAdapter or 0; out [rows, hidden]
// Layout  row-major, rows 16-byte aligned; an adapter's A is token-major [its vocab, lora_rank], its Bᵀ is [lora_rank, hidden]
// Token   a source below 2^31 is a token id; otherwise its low 31 bits are an index into `chosen` (ids that the step before left on the device)
// Launch  grid (rows), block 128
// Cost    bytes rows · hidden · (2 + 4), + 2 · lora_rank · (hidden + 1) + 8 · hidden per row with an adapter; no arithmetic to speak of;
//         log2(num_own) dependent reads to find a row of an adapter's own
// Limits  hidden % 8 == 0; token ids below the row's vocabulary (clamped: an id outside never reads outside)
#include "common.cuh"

struct EmbeddingAdapter {
  const bf16* a;
  const bf16* b_t;
  uint32_t lora_rank;
  float scaling;
  const bf16* table;   // null: the base model's
  const float* scale;  // [hidden]; null: ones
  const float* bias;   // [hidden]; null: zeros
  const uint32_t* own_ids;  // [num_own] ascending
  const bf16* own_rows;     // [num_own, hidden]
  uint32_t num_own;
  uint32_t vocab;  // tokens that the adapter has; those that the base model has not are in `table` or `own_ids`
};
static_assert(sizeof(EmbeddingAdapter) == 72, "written by the host");

// The row of a token, from the most particular place that has it.
DEVICE const bf16* row_of(uint32_t token, const bf16* table, uint32_t vocab, int hidden, const EmbeddingAdapter* adapter) {
  if (adapter != nullptr) {
    token = min(token, adapter->vocab - 1);
    uint32_t begin = 0, end = adapter->num_own;
    while (begin < end) {
      const uint32_t middle = (begin + end) / 2;
      if (adapter->own_ids[middle] < token) begin = middle + 1; else end = middle;
    }
    if (begin < adapter->num_own && adapter->own_ids[begin] == token) return adapter->own_rows + (int64_t)begin * hidden;
    if (adapter->table != nullptr) return adapter->table + (int64_t)token * hidden;
  }
  return table + (int64_t)min(token, vocab - 1) * hidden;
}

KERNEL __launch_bounds__(128) embedding(
    float* out, const bf16* table, const uint32_t* token_sources, const uint32_t* chosen, const uint64_t* adapters, int hidden, uint32_t vocab) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  uint32_t token = token_sources[row];
  if (token & 0x80000000u) token = chosen[token & 0x7fffffffu];
  const EmbeddingAdapter* adapter = reinterpret_cast<const EmbeddingAdapter*>(adapters[row]);
  const bf16* from = row_of(token, table, vocab, hidden, adapter);
  if (adapter != nullptr) token = min(token, adapter->vocab - 1);
  for (int column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
    const uint4 packed = load_16(from + column);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    float values[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      values[2 * i] = low_bf16(words[i]);
      values[2 * i + 1] = high_bf16(words[i]);
    }
    if (adapter != nullptr) {
      float delta[8] = {};
      for (uint32_t r = 0; r < adapter->lora_rank; r++) {
        const float a = __bfloat162float(adapter->a[(int64_t)token * adapter->lora_rank + r]);
        const uint4 b = load_16(adapter->b_t + (int64_t)r * hidden + column);
        const uint32_t b_words[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          delta[2 * i] += a * low_bf16(b_words[i]);
          delta[2 * i + 1] += a * high_bf16(b_words[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        values[i] += adapter->scaling * delta[i];
        if (adapter->scale != nullptr) values[i] *= adapter->scale[column + i];
        if (adapter->bias != nullptr) values[i] += adapter->bias[column + i];
      }
    }
    float4* to = reinterpret_cast<float4*>(out + row * hidden + column);
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[1] = make_float4(values[4], values[5], values[6], values[7]);
  }
}
