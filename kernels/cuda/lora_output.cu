// lora_output.cu   y[t, slice] = scale ⊙ y[t, slice] + bias   f32 arithmetic; y bf16 or f32, in place   Source: DoRA, arXiv:2402.09353; PEFT's lora_bias
//                  scale and bias of the row's adapter, each where it has one; after lora_expand: y is the base's output with the delta
// Shapes  y [T, y_stride], slices side by side; scale, bias [d_out] f32 by OutputTerms; items [*num_items]
// Layout  row-major, rows 16-byte aligned; rows in no item, and slices without terms, are not touched
// Launch  grid any (blocks stride over items · column tiles of 1024), block 128; 8 columns a thread
// Cost    bytes 2·size(y)·Σ rows·d_out + 8·Σ d_out (+ 4·Σ rows·d_out with `saved`): bandwidth is the roof
// Limits  d_out of each slice % 8 == 0; y_stride % 8 == 0
// Aside    A projection that is added to the residual stream has no y of its own. lora_set_aside moves the rows with terms to `saved` and leaves
//          zeros, so that base and delta are summed alone; then y = saved + scale ⊙ y + bias. Other rows don't notice
#include "common.cuh"

// What one adapter has for one group of projections in one layer, beside its LoraDescriptor. Null where it has none.
struct OutputTerms {
  const float* scale[3];
  const float* bias[3];
  uint64_t reserved[2];
};
static_assert(sizeof(OutputTerms) == 64, "written by the host");

struct OutputArgs {
  const LoraItem* items;
  const uint32_t* num_items;
  int d_out[3];
  int tile_start[3];
  int num_tiles;
  uint32_t descriptor_offset;
  int y_stride;
};

static constexpr int COLUMN_TILE = 1024;

DEVICE void load_8(const float* from, float (&values)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
  values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
}
DEVICE void store_8(float* to, const float (&values)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}
DEVICE void load_8(const bf16* from, float (&values)[8]) {
  const uint4 packed = load_16(from);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = low_bf16(words[i]);
    values[2 * i + 1] = high_bf16(words[i]);
  }
}
DEVICE void store_8(bf16* to, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

template <typename Y>
DEVICE void output_terms(Y* y, const float* saved, const OutputArgs& args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int total = (int)*args.num_items * args.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const LoraItem item = args.items[work / args.num_tiles];
    const int tile = work % args.num_tiles;
    const int slice = tile >= args.tile_start[2] ? 2 : tile >= args.tile_start[1] ? 1 : 0;
    const OutputTerms* terms = reinterpret_cast<const OutputTerms*>(item.descriptors + args.descriptor_offset);
    const float *scale = terms->scale[slice], *bias = terms->bias[slice];
    if (scale == nullptr && bias == nullptr) continue;
    const int column = (tile - args.tile_start[slice]) * COLUMN_TILE + threadIdx.x * 8;
    if (column >= args.d_out[slice]) continue;
    int y_start = 0;
    for (int s = 0; s < slice; s++) y_start += args.d_out[s];
    float factors[8] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f}, addends[8] = {};
    if (scale != nullptr) load_8(scale + column, factors);
    if (bias != nullptr) load_8(bias + column, addends);
    for (int row = item.row_start; row < (int)item.row_start + item.num_rows; row++) {
      const int64_t at = (int64_t)row * args.y_stride + y_start + column;
      float values[8], before[8] = {};
      load_8(y + at, values);
      if (saved != nullptr) load_8(saved + at, before);
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = before[i] + (values[i] * factors[i] + addends[i]);
      store_8(y + at, values);
    }
  }
}

KERNEL __launch_bounds__(128) lora_output_bf16(bf16* y, const float* saved, const __grid_constant__ OutputArgs args) { output_terms<bf16>(y, saved, args); }
KERNEL __launch_bounds__(128) lora_output_f32(float* y, const float* saved, const __grid_constant__ OutputArgs args) { output_terms<float>(y, saved, args); }

// One slice: the rows that lora_output_f32 will want back.
KERNEL __launch_bounds__(128) lora_set_aside(float* y, float* saved, const __grid_constant__ OutputArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int total = (int)*args.num_items * args.num_tiles;
  for (int work = blockIdx.x; work < total; work += gridDim.x) {
    const LoraItem item = args.items[work / args.num_tiles];
    const OutputTerms* terms = reinterpret_cast<const OutputTerms*>(item.descriptors + args.descriptor_offset);
    if (terms->scale[0] == nullptr && terms->bias[0] == nullptr) continue;
    const int column = work % args.num_tiles * COLUMN_TILE + threadIdx.x * 8;
    if (column >= args.d_out[0]) continue;
    const float zeros[8] = {};
    for (int row = item.row_start; row < (int)item.row_start + item.num_rows; row++) {
      const int64_t at = (int64_t)row * args.y_stride + column;
      float values[8];
      load_8(y + at, values);
      store_8(saved + at, values);
      store_8(y + at, zeros);
    }
  }
}
