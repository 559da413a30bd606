// sampling.cu   one token (and log-probabilities) from each row of logits; the meaning is that of engine/src/sampling.rs, step by step
//               Source: nucleus arXiv:1904.09751, min-p arXiv:2407.01082; the draw `u` comes with the row (counter-based, made by the host)
// Shapes  logits: by row `vocab` f32 from `logits_start` on (edited in place, restored at the end); params [rows]; edits: the changed tokens of each row, ids distinct;
//         masks: words of allowed bits; results [rows]; top_ids, top_logprobs [rows, MAX_TOP]; chosen: ids by `slot`, for the next step's input
// Launch  grid (rows), block 1024, dynamic shared MAX_CANDIDATES · 8 bytes; a row is one block's, in as few passes as its parameters allow:
//         greedy 1; plain temperature 3; top-k, top-p 3 or 4 and a sort of the candidates in shared memory
// Cost    bytes 4 · vocab a pass, from L2 but for the first
// Limits  vocab < 2^31; top-k log-probabilities up to MAX_TOP (the host does more)
// Method  No sort of the vocabulary. The k-th largest of the threads' maxima bounds the k-th largest logit from below, and a token outside the
//         nucleus weighs less than (1 - top_p) · sum / vocab: what passes these bounds is collected and sorted. When that is more than
//         MAX_CANDIDATES (flat distributions), the bound is found by bisection over the bits of the logit instead, one pass a bit.
#include "common.cuh"

static constexpr int THREADS = 1024;
static constexpr int WARPS = THREADS / 32;
static constexpr int MAX_CANDIDATES = 4096;
static constexpr int MAX_TOP = 64;

enum : uint32_t { CHOOSE = 1, MASKED = 2, OUTPUT_LOGPROB = 4, PROMPT_LOGPROB = 8 };
enum : uint32_t { STATUS_OK = 0, STATUS_NOT_FINITE = 1, STATUS_NOTHING_ALLOWED = 2 };
enum : uint32_t { EDIT_FORBIDDEN = 0x80000000u, EDIT_SEEN = 0x40000000u, EDIT_COUNT = 0x3fffffffu };

struct SampleParams {
  double u;  // in [0, 1)
  uint32_t flags;
  float temperature;  // 0: greedy
  float top_p;
  float min_p;
  uint32_t top_k;  // 0: all
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  uint32_t edits_start;
  uint32_t num_edits;
  uint32_t mask_start;  // in words
  uint32_t num_top;     // likeliest tokens to report
  uint32_t prompt_token;
  uint32_t slot;
  uint32_t vocab;  // of this row
  uint32_t reserved;
  uint64_t logits_start;  // in elements
};
static_assert(sizeof(SampleParams) == 80, "written by the host");

struct SampleEdit {
  uint32_t token;
  uint32_t counts;  // EDIT_*
  float bias;
  float saved;  // the logit as it came
};

struct SampleResult {
  uint32_t token;
  uint32_t status;
  float logprob;
  float prompt_logprob;
};

// exp(x) for x <= 0 with the same roundings as the host's (no fused multiply-add), so that both draw the same token from the same logits.
DEVICE float exp_nonpositive(float x) {
  const float least = -87.0f;
  const float clamped = x > least ? x : least;
  const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504088896340736f), 12582912.0f);
  const float whole = shifted - 12582912.0f;
  const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(whole, 0.6933594f)), __fmul_rn(whole, -2.1219444e-4f));
  float polynomial = 1.9875691e-4f;
  const float coefficients[5] = {1.3982e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f};
#pragma unroll
  for (int i = 0; i < 5; i++) polynomial = __fadd_rn(__fmul_rn(polynomial, r), coefficients[i]);
  const float fraction = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(polynomial, r), r), r), 1.0f);
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return x > least ? __fmul_rn(fraction, power) : 0.0f;
}

// Order of floats as order of unsigned integers, and back.
DEVICE uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float from_ordered(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct Shared {
  double doubles[WARPS];
  unsigned long long longs[WARPS];
  uint64_t pairs[WARPS];
  uint32_t count;
  uint32_t result;
};

DEVICE double block_sum_f64(double x, Shared& s) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.doubles[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < WARPS; w++) total += s.doubles[w];
  return total;
}
DEVICE unsigned long long block_sum_u64(unsigned long long x, Shared& s) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.longs[threadIdx.x / 32] = x;
  __syncthreads();
  unsigned long long total = 0;
  for (int w = 0; w < WARPS; w++) total += s.longs[w];
  return total;
}
DEVICE uint64_t block_max_u64(uint64_t x, Shared& s) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x = max(x, (uint64_t)__shfl_xor_sync(0xffffffffu, x, mask));
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.pairs[threadIdx.x / 32] = x;
  __syncthreads();
  uint64_t largest = 0;
  for (int w = 0; w < WARPS; w++) largest = max(largest, s.pairs[w]);
  return largest;
}

// Larger first: by logit, then by lower id.
DEVICE uint64_t rank_key(float logit, uint32_t token) { return (uint64_t)ordered(logit) << 32 | (uint32_t)~token; }
DEVICE uint32_t token_of(uint64_t key) { return ~(uint32_t)key; }
DEVICE float logit_of(uint64_t key) { return from_ordered((uint32_t)(key >> 32)); }

// Sorts `n` keys, largest first (bitonic); pads with 0 to a power of two, which is below every key of a logit above -infinity.
DEVICE void sort_descending(uint64_t* keys, uint32_t n) {
  uint32_t size = 32;
  while (size < n) size *= 2;
  for (uint32_t i = n + threadIdx.x; i < size; i += THREADS) keys[i] = 0;
  __syncthreads();
  for (uint32_t length = 2; length <= size; length *= 2) {
    for (uint32_t stride = length / 2; stride > 0; stride /= 2) {
      for (uint32_t i = threadIdx.x; i < size / 2; i += THREADS) {
        const uint32_t a = 2 * i - (i & (stride - 1)), b = a + stride;
        const uint64_t x = keys[a], y = keys[b];
        if ((x < y) == ((a & length) == 0)) {
          keys[a] = y;
          keys[b] = x;
        }
      }
      __syncthreads();
    }
  }
}

struct Row {
  const float* logits;
  const uint32_t* mask;  // null: all allowed
  uint32_t vocab;
  DEVICE_METHOD bool allowed(uint32_t token) const { return mask == nullptr || (mask[token / 32] >> (token % 32) & 1); }
};

// Largest key (0 if nothing is above -infinity), this thread's own largest logit, and whether a logit is NaN or +infinity.
DEVICE uint64_t largest(const Row& row, float& own, bool& not_finite, Shared& s) {
  uint64_t best = 0;
  own = -INFINITY;
  uint32_t bad = 0;
  for (uint32_t token = threadIdx.x; token < row.vocab; token += THREADS) {
    const float logit = row.logits[token];
    bad |= !(logit <= 3.402823466e38f);
    if (logit > own && row.allowed(token)) {
      own = logit;
      best = rank_key(logit, token);
    }
  }
  not_finite = __syncthreads_or(bad);
  return block_max_u64(best, s);
}

// A lower bound of the k-th largest logit, k <= THREADS: the k-th largest of the threads' own.
DEVICE float bound_top_k(float own, uint32_t k, uint64_t* keys) {
  __syncthreads();
  keys[threadIdx.x] = rank_key(own, threadIdx.x);
  __syncthreads();
  sort_descending(keys, THREADS);
  const float bound = logit_of(keys[k - 1]);
  __syncthreads();
  return bound;
}

// Collects and sorts the tokens with logit >= bound (and above -infinity); their number may exceed MAX_CANDIDATES, then the list is not usable.
DEVICE uint32_t collect(const Row& row, float bound, uint64_t* keys, Shared& s) {
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t base = 0; base < row.vocab; base += THREADS) {
    const uint32_t token = base + threadIdx.x;
    const float logit = token < row.vocab ? row.logits[token] : -INFINITY;
    const bool take = logit >= bound && logit > -INFINITY && row.allowed(token);
    const uint32_t takers = __ballot_sync(0xffffffffu, take);
    if (takers != 0) {
      uint32_t at = 0;
      if (lane == 0) at = atomicAdd(&s.count, (uint32_t)__popc(takers));
      at = __shfl_sync(0xffffffffu, at, 0) + __popc(takers & ((1u << lane) - 1));
      if (take && at < MAX_CANDIDATES) keys[at] = rank_key(logit, token);
    }
  }
  __syncthreads();
  const uint32_t count = s.count;
  if (count <= MAX_CANDIDATES) sort_descending(keys, count);
  return count;
}

// The tokens that may be drawn: logit above `threshold`, or equal to it and among the lowest ids up to `last_equal`; weight at least min_p.
struct Kept {
  float max;
  float temperature;
  float min_p;
  float threshold;
  uint32_t last_equal;
};
DEVICE float kept_weight(const Row& row, const Kept& kept, uint32_t token) {
  const float logit = row.logits[token];
  if (logit < kept.threshold || (logit == kept.threshold && token > kept.last_equal) || !row.allowed(token)) return 0.f;
  const float weight = exp_nonpositive((logit - kept.max) / kept.temperature);
  return weight < kept.min_p ? 0.f : weight;
}

// Inverse CDF in order of id over the kept tokens. Each warp owns a run of neighbouring tokens.
DEVICE uint32_t draw_from_all(const Row& row, const Kept& kept, double u, Shared& s) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t per_warp = ((row.vocab + WARPS - 1) / WARPS + 31) & ~31u;
  const uint32_t begin = min(row.vocab, warp * per_warp), end = min(row.vocab, begin + per_warp);
  double own = 0;
  for (uint32_t token = begin + lane; token < end; token += 32) own += kept_weight(row, kept, token);
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) own += __shfl_xor_sync(0xffffffffu, own, mask);
  __syncthreads();
  if (lane == 0) s.doubles[warp] = own;
  if (threadIdx.x == 0) s.result = 0;
  __syncthreads();
  double total = 0, before = 0;
  for (int w = 0; w < WARPS; w++) {
    if (w == (int)warp) before = total;
    total += s.doubles[w];
  }
  const double target = u * total;
  // The warp in whose run the sum passes the target; should rounding leave none, the last one with any weight.
  bool mine = before <= target && before + own > target;
  int last = 0;
  for (int w = 0; w < WARPS; w++) {
    if (s.doubles[w] > 0) last = w;
  }
  mine |= (int)warp == last && target >= total;
  if (mine) {
    double cumulated = before;
    uint32_t found = 0xffffffffu, last_weighted = 0;
    for (uint32_t base = begin; base < end && found == 0xffffffffu; base += 32) {
      const uint32_t token = base + lane;
      const float weight = token < end ? kept_weight(row, kept, token) : 0.f;
      double sum = weight;
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const double below = __shfl_up_sync(0xffffffffu, sum, delta);
        if ((int)lane >= delta) sum += below;
      }
      const uint32_t passed = __ballot_sync(0xffffffffu, weight > 0.f && cumulated + sum > target);
      const uint32_t weighted = __ballot_sync(0xffffffffu, weight > 0.f);
      if (passed != 0) found = base + __ffs(passed) - 1;
      if (weighted != 0) last_weighted = base + 31 - __clz(weighted);
      cumulated += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) s.result = found != 0xffffffffu ? found : last_weighted;
  }
  __syncthreads();
  return s.result;
}

// The same over a sorted list's first `len` candidates: sorted again, by id.
DEVICE uint32_t draw_from_list(uint64_t* keys, uint32_t len, const Kept& kept, double u, Shared& s) {
  for (uint32_t i = threadIdx.x; i < len; i += THREADS) {
    const float weight = exp_nonpositive((logit_of(keys[i]) - kept.max) / kept.temperature);
    keys[i] = (uint64_t)~token_of(keys[i]) << 32 | __float_as_uint(weight);
  }
  sort_descending(keys, len);
  // Runs of 4 candidates a thread, scanned by warps and then over the warps.
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double own = 0;
  for (uint32_t i = threadIdx.x * 4; i < min(len, threadIdx.x * 4 + 4); i++) own += __uint_as_float((uint32_t)keys[i]);
  double sum = own;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const double below = __shfl_up_sync(0xffffffffu, sum, delta);
    if ((int)lane >= delta) sum += below;
  }
  __syncthreads();
  if (lane == 31) s.doubles[warp] = sum;
  if (threadIdx.x == 0) s.result = 0xffffffffu;
  __syncthreads();
  double total = 0, before = 0;
  for (int w = 0; w < WARPS; w++) {
    if (w == (int)warp) before = total;
    total += s.doubles[w];
  }
  const double target = u * total;
  double cumulated = before + sum - own;
  for (uint32_t i = threadIdx.x * 4; i < min(len, threadIdx.x * 4 + 4); i++) {
    cumulated += __uint_as_float((uint32_t)keys[i]);
    if (cumulated > target && (uint32_t)keys[i] != 0) {
      atomicMin(&s.result, i);
      break;
    }
  }
  __syncthreads();
  uint32_t index = s.result;
  if (index == 0xffffffffu) {
    index = len - 1;
    while (index > 0 && (uint32_t)keys[index] == 0) index--;
  }
  return ~(uint32_t)(keys[index] >> 32);
}

// How many of a sorted list's first `len` reach `target` with their weights; len if all together do not.
DEVICE uint32_t nucleus_len(const uint64_t* keys, uint32_t len, const Kept& kept, double target, Shared& s) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double own = 0;
  for (uint32_t i = threadIdx.x * 4; i < min(len, threadIdx.x * 4 + 4); i++) own += exp_nonpositive((logit_of(keys[i]) - kept.max) / kept.temperature);
  double sum = own;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const double below = __shfl_up_sync(0xffffffffu, sum, delta);
    if ((int)lane >= delta) sum += below;
  }
  __syncthreads();
  if (lane == 31) s.doubles[warp] = sum;
  if (threadIdx.x == 0) s.result = len;
  __syncthreads();
  double cumulated = sum - own;
  for (uint32_t w = 0; w < warp; w++) cumulated += s.doubles[w];
  for (uint32_t i = threadIdx.x * 4; i < min(len, threadIdx.x * 4 + 4); i++) {
    cumulated += exp_nonpositive((logit_of(keys[i]) - kept.max) / kept.temperature);
    if (cumulated >= target) {
      atomicMin(&s.result, i + 1);
      break;
    }
  }
  __syncthreads();
  return s.result;
}

// A weight as a whole number, so that sums do not depend on their order.
DEVICE unsigned long long fixed_weight(float weight) { return (unsigned long long)((double)weight * 1099511627776.0); }

// The largest key at or above which (tokens of logit below `floor` and equal ones past `last_equal` aside) counts or weights reach `target`.
template <bool by_weight>
DEVICE uint32_t bisect(const Row& row, const Kept& kept, unsigned long long target, Shared& s) {
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const uint32_t candidate = found | 1u << bit;
    unsigned long long sum = 0;
    for (uint32_t token = threadIdx.x; token < row.vocab; token += THREADS) {
      const float logit = row.logits[token];
      if (ordered(logit) >= candidate && logit > -INFINITY && row.allowed(token)) {
        if (by_weight) {
          if (logit > kept.threshold || (logit == kept.threshold && token <= kept.last_equal))
            sum += fixed_weight(exp_nonpositive((logit - kept.max) / kept.temperature));
        } else {
          sum += 1;
        }
      }
    }
    if (block_sum_u64(sum, s) >= target) found = candidate;
  }
  return found;
}

// With `threshold` given: the id of the n-th token whose logit equals it (n >= 1), or the last id if there are fewer.
DEVICE uint32_t nth_equal(const Row& row, float threshold, uint32_t n, Shared& s) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t per_warp = ((row.vocab + WARPS - 1) / WARPS + 31) & ~31u;
  const uint32_t begin = min(row.vocab, warp * per_warp), end = min(row.vocab, begin + per_warp);
  uint32_t own = 0;
  for (uint32_t base = begin; base < end; base += 32) {
    const uint32_t token = base + lane;
    own += __popc(__ballot_sync(0xffffffffu, token < end && row.logits[token] == threshold && row.allowed(token)));
  }
  __syncthreads();
  if (lane == 0) s.longs[warp] = own;
  if (threadIdx.x == 0) s.result = row.vocab - 1;
  __syncthreads();
  uint32_t before = 0;
  for (uint32_t w = 0; w < warp; w++) before += (uint32_t)s.longs[w];
  if (before < n && before + own >= n) {
    for (uint32_t base = begin; base < end; base += 32) {
      const uint32_t token = base + lane;
      const bool equal = token < end && row.logits[token] == threshold && row.allowed(token);
      const uint32_t equals = __ballot_sync(0xffffffffu, equal);
      if (equal && before + __popc(equals & ((1u << lane) - 1)) + 1 == n) s.result = token;
      before += __popc(equals);
    }
  }
  __syncthreads();
  return s.result;
}

// Steps 6 and 7 for distributions too flat for a list: narrows `kept` by bisection.
DEVICE void narrow_by_bisection(const Row& row, const SampleParams& p, Kept& kept, Shared& s) {
  if (p.top_k > 0 && p.top_k < row.vocab) {
    const uint32_t key = bisect<false>(row, kept, p.top_k, s);
    if (key != 0) {
      kept.threshold = from_ordered(key);
      unsigned long long above = 0;
      for (uint32_t token = threadIdx.x; token < row.vocab; token += THREADS) above += row.logits[token] > kept.threshold && row.allowed(token);
      kept.last_equal = nth_equal(row, kept.threshold, p.top_k - (uint32_t)block_sum_u64(above, s), s);
    }
  }
  if (p.top_p < 1.f) {
    unsigned long long total = 0;
    for (uint32_t token = threadIdx.x; token < row.vocab; token += THREADS) {
      const float logit = row.logits[token];
      if ((logit > kept.threshold || (logit == kept.threshold && token <= kept.last_equal)) && logit > -INFINITY && row.allowed(token))
        total += fixed_weight(exp_nonpositive((logit - kept.max) / kept.temperature));
    }
    total = block_sum_u64(total, s);
    const unsigned long long target = max(1ull, (unsigned long long)ceil((double)p.top_p * (double)total));
    const uint32_t key = bisect<true>(row, kept, target, s);
    if (key != 0) {
      const float threshold = from_ordered(key);
      unsigned long long above = 0;
      for (uint32_t token = threadIdx.x; token < row.vocab; token += THREADS) {
        const float logit = row.logits[token];
        if (logit > threshold && row.allowed(token)) above += fixed_weight(exp_nonpositive((logit - kept.max) / kept.temperature));
      }
      above = block_sum_u64(above, s);
      const unsigned long long each = max(1ull, fixed_weight(exp_nonpositive((threshold - kept.max) / kept.temperature)));
      const uint32_t equals = (uint32_t)min((target - above + each - 1) / each, (unsigned long long)row.vocab);
      const uint32_t last = nth_equal(row, threshold, equals, s);
      kept.last_equal = threshold == kept.threshold ? min(last, kept.last_equal) : last;
      kept.threshold = threshold;
    }
  }
}

// Steps 5 to 9 for temperature > 0.
DEVICE uint32_t draw(const Row& row, const SampleParams& p, float max_logit, float own, uint64_t* keys, Shared& s) {
  Kept kept = {max_logit, p.temperature, p.min_p, -INFINITY, row.vocab};
  const bool takes_top_k = p.top_k > 0 && p.top_k < row.vocab;
  if (!takes_top_k && p.top_p >= 1.f) return draw_from_all(row, kept, p.u, s);

  double total = 0;  // of all weights; needed by top-p without top-k
  float bound = -INFINITY;
  bool listed = true;
  if (takes_top_k) {
    listed = p.top_k <= THREADS;
    if (listed) bound = bound_top_k(own, p.top_k, keys);
  } else {
    for (uint32_t token = threadIdx.x; token < row.vocab; token += THREADS) {
      if (row.allowed(token)) total += exp_nonpositive((row.logits[token] - max_logit) / p.temperature);
    }
    total = block_sum_f64(total, s);
    // Lighter tokens than `least` weigh less than (1 - top_p) · total together, so that none of them is in the nucleus. The logit of that
    // weight, a little lower for the roundings.
    const double least = (1.0 - (double)p.top_p) * total / row.vocab;
    bound = least > 0 ? max_logit + p.temperature * ((float)log(least) - 1e-3f) : -INFINITY;
  }
  uint32_t count = listed ? collect(row, bound, keys, s) : MAX_CANDIDATES + 1;
  if (count > MAX_CANDIDATES) {
    narrow_by_bisection(row, p, kept, s);
    return draw_from_all(row, kept, p.u, s);
  }
  uint32_t len = takes_top_k ? min(count, p.top_k) : count;
  if (p.top_p < 1.f) {
    if (takes_top_k) {
      double sum = 0;
      for (uint32_t i = threadIdx.x; i < len; i += THREADS) sum += exp_nonpositive((logit_of(keys[i]) - max_logit) / p.temperature);
      total = block_sum_f64(sum, s);
    }
    len = nucleus_len(keys, len, kept, (double)p.top_p * total, s);
  }
  // min_p: weights descend, so those that stay are a prefix; the first weighs 1.
  unsigned long long stay = 0;
  for (uint32_t i = threadIdx.x; i < len; i += THREADS) stay += exp_nonpositive((logit_of(keys[i]) - max_logit) / p.temperature) >= p.min_p;
  len = max(1u, (uint32_t)block_sum_u64(stay, s));
  __syncthreads();
  return draw_from_list(keys, len, kept, p.u, s);
}

KERNEL __launch_bounds__(THREADS, 1) sample(
    float* all_logits, const SampleParams* all_params, SampleEdit* all_edits, const uint32_t* masks, SampleResult* results, uint32_t* top_ids,
    float* top_logprobs, uint32_t* chosen) {
  __shared__ Shared s;
  DYNAMIC_SHARED(uint64_t, keys);
  const SampleParams p = all_params[blockIdx.x];
  allow_next_kernel();
  wait_for_previous_kernel();
  float* logits = all_logits + p.logits_start;
  const uint32_t vocab = p.vocab;
  SampleEdit* edits = all_edits + p.edits_start;
  Row row = {logits, nullptr, vocab};
  SampleResult result = {0, STATUS_OK, 0.f, 0.f};

  float own;
  bool not_finite;
  uint64_t best = largest(row, own, not_finite, s);
  if (not_finite || best == 0) {
    result.status = STATUS_NOT_FINITE;
    if (threadIdx.x == 0) {
      results[blockIdx.x] = result;
      if (p.flags & CHOOSE) chosen[p.slot] = 0;
    }
    return;
  }

  // Log-probabilities are of the logits as they came.
  double log_sum_exp = 0;
  if (p.flags & (OUTPUT_LOGPROB | PROMPT_LOGPROB)) {
    const float max_logit = logit_of(best);
    double sum = 0;
    for (uint32_t token = threadIdx.x; token < vocab; token += THREADS) sum += exp_nonpositive(logits[token] - max_logit);
    log_sum_exp = (double)max_logit + log(block_sum_f64(sum, s));
    if (p.num_top > 0) {
      const uint32_t count = collect(row, bound_top_k(own, min(p.num_top, (uint32_t)MAX_TOP), keys), keys, s);
      // More than MAX_CANDIDATES at or above the bound are equal to it (or nearly): the host sees a short list and does this row itself.
      for (uint32_t i = threadIdx.x; i < MAX_TOP; i += THREADS) {
        const bool there = count <= MAX_CANDIDATES && i < min(p.num_top, count);
        top_ids[(int64_t)blockIdx.x * MAX_TOP + i] = there ? token_of(keys[i]) : 0xffffffffu;
        top_logprobs[(int64_t)blockIdx.x * MAX_TOP + i] = there ? (float)((double)logit_of(keys[i]) - log_sum_exp) : -INFINITY;
      }
    }
    if ((p.flags & PROMPT_LOGPROB) && p.prompt_token < vocab) result.prompt_logprob = (float)((double)logits[p.prompt_token] - log_sum_exp);
    __syncthreads();
  }

  if (p.flags & CHOOSE) {
    for (uint32_t i = threadIdx.x; i < p.num_edits; i += THREADS) {
      SampleEdit& edit = edits[i];
      if (edit.token < vocab) {
        float logit = logits[edit.token];
        edit.saved = logit;
        const uint32_t times = edit.counts & EDIT_COUNT;
        if (edit.counts & EDIT_SEEN) logit = logit > 0.f ? logit / p.repetition_penalty : logit * p.repetition_penalty;
        if (times > 0) logit = __fsub_rn(logit, __fadd_rn(__fmul_rn(p.frequency_penalty, (float)times), p.presence_penalty));
        logit += edit.bias;
        logits[edit.token] = edit.counts & EDIT_FORBIDDEN ? -INFINITY : logit;
      }
    }
    __syncthreads();
    if (p.flags & MASKED) row.mask = masks + p.mask_start;
    if (p.num_edits > 0 || (p.flags & MASKED)) best = largest(row, own, not_finite, s);
    if (not_finite) {
      result.status = STATUS_NOT_FINITE;
    } else if (best == 0) {
      result.status = STATUS_NOTHING_ALLOWED;
    } else {
      result.token = p.temperature == 0.f ? token_of(best) : draw(row, p, logit_of(best), own, keys, s);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.num_edits; i += THREADS) {
      if (edits[i].token < vocab) logits[edits[i].token] = edits[i].saved;
    }
    __syncthreads();
    if (p.flags & OUTPUT_LOGPROB) result.logprob = (float)((double)logits[result.token] - log_sum_exp);
  }
  if (threadIdx.x == 0) {
    results[blockIdx.x] = result;
    if (p.flags & CHOOSE) chosen[p.slot] = result.token;
  }
}
