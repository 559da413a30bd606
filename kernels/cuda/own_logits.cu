// own_logits.cu   logits of rows whose adapter has tokens of its own, beside those that the base model's head or the adapter's whole one makes
//         copy_logits        logits[to + j] = logits[from + j]: what a row keeps of the base model's, to where the row has room for its own
//         token_row_logits   logits[y_start + t · y_stride + id(j)] = x[row_start + t,:] · rows[j,:]ᵀ: tokens whose row of the head the adapter
//                            brings; bf16 in, f32 sums, f32 out.   Source: PEFT's TrainableTokensLayer; `resize_token_embeddings`
// Shapes  x [T, hidden]; copies [gridDim.y]; items [gridDim.y] of up to 8 neighbouring rows of one adapter; its rows [num_tokens, hidden]
// Layout  row-major, rows 16-byte aligned; other logits are not touched
// Launch  copy: grid (ceil(longest / 2048), copies), block 256; token rows: grid (ceil(most tokens / 8), items), block 256, a warp a token
// Cost    copy: bytes 8 · Σ len. Token rows: bytes 2 · hidden · Σ num_tokens, flops 2 · hidden · Σ num_rows · num_tokens: bandwidth is the roof
// Limits  hidden % 8 == 0; what a copy reads and what it writes are apart
#include "common.cuh"

struct LogitsCopy {
  uint64_t from;  // in elements
  uint64_t to;
  uint32_t len;
  uint32_t reserved;
};
static_assert(sizeof(LogitsCopy) == 24, "written by the host");

struct TokenRowsItem {
  const bf16* rows;
  const uint32_t* token_ids;
  uint64_t y_start;  // in elements: the first row's logits
  uint32_t y_stride;
  uint32_t num_tokens;
  uint32_t row_start;  // of x
  uint32_t num_rows;
};
static_assert(sizeof(TokenRowsItem) == 40, "written by the host");

static constexpr int THREADS = 256;
static constexpr int MAX_ROWS = 8;
static constexpr int COPY_TILE = 8 * THREADS;

KERNEL __launch_bounds__(THREADS) copy_logits(float* logits, const LogitsCopy* copies) {
  const LogitsCopy copy = copies[blockIdx.y];
  allow_next_kernel();
  wait_for_previous_kernel();
  const float* from = logits + copy.from;
  float* to = logits + copy.to;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t column = blockIdx.x * COPY_TILE + i * THREADS + threadIdx.x;
    if (column < copy.len) values[i] = from[column];
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t column = blockIdx.x * COPY_TILE + i * THREADS + threadIdx.x;
    if (column < copy.len) to[column] = values[i];
  }
}

KERNEL __launch_bounds__(THREADS) token_row_logits(float* logits, const bf16* x, const TokenRowsItem* items, int hidden) {
  const TokenRowsItem item = items[blockIdx.y];
  const uint32_t token = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  allow_next_kernel();
  bool waited = false;
  float sums[MAX_ROWS] = {};
  if (token < item.num_tokens) {
    const bf16* weights = item.rows + (int64_t)token * hidden;
    for (int column = lane * 8; column < hidden; column += 256) {
      const uint4 w = load_stream_16(weights + column);
      if (!waited) {
        wait_for_previous_kernel();
        waited = true;
      }
      const uint32_t w_words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int row = 0; row < MAX_ROWS; row++) {
        if (row < (int)item.num_rows) {
          const uint4 values = load_16(x + (int64_t)(item.row_start + row) * hidden + column);
          const uint32_t x_words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            sums[row] += low_bf16(w_words[i]) * low_bf16(x_words[i]);
            sums[row] += high_bf16(w_words[i]) * high_bf16(x_words[i]);
          }
        }
      }
    }
  }
  if (!waited) wait_for_previous_kernel();
  if (token >= item.num_tokens) return;
  const uint32_t id = item.token_ids[token];
#pragma unroll
  for (int row = 0; row < MAX_ROWS; row++) {
    if (row < (int)item.num_rows) {
      const float sum = warp_sum(sums[row]);
      if (lane == 0) logits[item.y_start + (uint64_t)row * item.y_stride + id] = sum;
    }
  }
}
