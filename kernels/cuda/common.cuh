// common.cuh   Types, wide loads, warp-level matrix instructions and launch ordering, shared by the kernels.
//
// Fragment layouts named below are those of `mma.sync.m16n8k16` (PTX ISA, "Matrix fragments for mma.m16n8k16"). In a warp, lane = 4·g + t:
//   A [16, 16]  a0: (row g, k 2t..2t+1)  a1: (row g+8, same k)  a2: (row g, k 2t+8..2t+9)  a3: (row g+8, same k)
//   B [16, 8]   b0: (k 2t..2t+1, col g)  b1: (k 2t+8..2t+9, col g)
//   D [16, 8]   d0, d1: (row g, cols 2t, 2t+1)  d2, d3: (row g+8, same cols)
// A sum over k does not depend on the order of k, so a lane may load 8 neighbouring values of a row in one 16-byte load and use them as the
// k slots of two instructions, as long as A and B are loaded alike ("permuted k").
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
#define KERNEL extern "C" __global__ void

#ifdef CUDA_EMULATION
#include "emulation.h"
#else

#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char name##_bytes[]; type* name = reinterpret_cast<type*>(name##_bytes)

// d += a · b.
DEVICE void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8x8 matrix of 16-bit values held as (row g, cols 2t..2t+1).
DEVICE uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Four 8x8 matrices of 16-bit values; lane l names row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Copies 16 bytes to shared memory in the background; writes zeros when `valid` is false (`global` must be a legal address all the same).
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are unfinished.
template <int pending>
DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// 16 bytes of data that no kernel writes while this one runs (weights), read once: kept out of L1.
DEVICE uint4 load_stream_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 bytes past L1: what another kernel may have written while this one already ran.
DEVICE uint4 load_fresh_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// 2^x in one instruction; results below the least normal number are 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 900
// Blocks of a cluster (sm_90): all of them come here before any goes on, and then sees what the others wrote.
DEVICE void cluster_barrier() { asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Where a block of the cluster has what this one has at a shared memory address; and a load from there.
DEVICE uint32_t address_in_cluster(uint32_t address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
DEVICE float load_in_cluster(uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
#endif

// Programmatic dependent launch (sm_90): a kernel starts while the one before it still runs. Everything before `wait_for_previous_kernel`
// may read only what no earlier kernel of the step writes (weights, the step's metadata). Every kernel calls both, whatever path it takes,
// so that "the previous kernel is complete" implies that all earlier ones are. lora_shrink.cu beside a GEMM is the exception: there, all blocks but
// one go on with an x that the kernel before the GEMM has finished.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}
DEVICE uint4 load_16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
DEVICE uint4 zero_16() { return make_uint4(0, 0, 0, 0); }

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// The sum over a block of `num_warps` warps, in every thread. `shared` holds num_warps floats; the caller does not reuse it before a barrier.
template <int num_warps>
DEVICE float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < num_warps; w++) total += shared[w];
  return total;
}

// Activations of the gated MLP.
DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
DEVICE float gelu_tanh(float x) {
  // 0.5 · x · (1 + tanh(u)) = x · sigmoid(2u)
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.f + __expf(-2.f * u));
}

// What one adapter has for one group of projections that share their input (q, k, v; o; gate, up; down; lm_head) in one layer.
// `a` is the stack of the slices' A, [rank_total, d_in]; slices that the adapter lacks have rank 0.
struct LoraDescriptor {
  const bf16* a;
  const bf16* b_t[3];
  uint16_t lora_rank[3];
  uint16_t rank_total;
  float scaling[3];
  uint32_t reserved[3];
};
static_assert(sizeof(LoraDescriptor) == 64, "one descriptor is 64 bytes; engine/src/backend/cuda writes them");

// Neighbouring rows under one adapter. `descriptors` is the address of the adapter's descriptor table, one per layer and group.
struct LoraItem {
  uint64_t descriptors;
  uint32_t row_start;
  uint16_t num_rows;
  uint16_t rank_tile;  // of the stacked A, 16 ranks each (shrink only)
};
static_assert(sizeof(LoraItem) == 16, "written by the host");
