// random_fill.cu   out[i] = uniform in [center - half_width, center + half_width), a function of (seed, i)   bf16
//                  Source: the finalizer of SplitMix64. For weights of benchmarks, made on the device
// Launch  grid any (threads stride), block 256
// Cost    bytes 2 · n
#include "common.cuh"

KERNEL __launch_bounds__(256) random_fill(bf16* out, int64_t n, uint64_t seed, float center, float half_width) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
    uint64_t x = seed + 0x9e3779b97f4a7c15ull * (uint64_t)(i + 1);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    out[i] = __float2bfloat16_rn(center + half_width * ((float)(x >> 40) * (2.f / 16777216.f) - 1.f));
  }
}
