// The CUDA kernel of the plugin library on a CPU: a thread of the machine for each of a thread block's, one thread block
// after the other. It shows what the kernel computes, not that a GPU runs it.
#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#include "simd.h"

#define ULTRAMEM_CUDA_ON_CPU
#define __global__
#define __device__
#define __restrict__
#define __shared__ static
#define __launch_bounds__(threads)

struct uint4 {
  unsigned x, y, z, w;
};
struct Index3 {
  unsigned x, y, z;
};
static thread_local Index3 threadIdx, blockIdx;
static std::barrier<>* all_threads;
static void __syncthreads() { all_threads->arrive_and_wait(); }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Whatever the warp: all threads of the block come here together.
static unsigned __ballot_sync(unsigned, bool vote) {
  static bool votes[1024];
  votes[threadIdx.x] = vote;
  __syncthreads();
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= static_cast<unsigned>(votes[threadIdx.x / 32 * 32 + i]) << i;
  __syncthreads();
  return bits;
}

#include "onnx/cuda/lookup_kernel.cuh"

namespace ultramem::cuda {
inline float widen(Half from) { return ultramem::to_float({from.bits}); }
inline void narrow(float from, Half& to) { to.bits = ultramem::to_float16(from).bits; }
}  // namespace ultramem::cuda

using namespace ultramem::cuda;

template <class Stored, class Score, class Out, bool kWide>
void run_as(const void* rows, const float* scales, const long long* indices, const void* scores, void* out,
            long long tokens, Sizes size) {
  constexpr int part = kThreads * kThreadColumns<Stored, kWide>;
  std::barrier<> barrier(kThreads);
  all_threads = &barrier;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      threadIdx = {thread, 0, 0};
      for (unsigned t = 0; t < tokens; ++t) {
        for (unsigned e = 0; e < static_cast<unsigned>(size.blocks); ++e) {
          for (unsigned p = 0; p < static_cast<unsigned>((size.d + part - 1) / part); ++p) {
            blockIdx = {t, e, p};
            lookup_reduce<Stored, Score, Out, kWide>(static_cast<const Stored*>(rows), scales, indices,
                                                     static_cast<const Score*>(scores), static_cast<Out*>(out), size);
            barrier.arrive_and_wait();
          }
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

template <class Stored, class Score, class Out>
void run(const void* rows, const float* scales, const long long* indices, const void* scores, void* out,
         long long tokens, Sizes size) {
  const bool wide = size.core_columns % kThreadColumns<Stored, true> == 0;
  (wide ? run_as<Stored, Score, Out, true> : run_as<Stored, Score, Out, false>)(rows, scales, indices, scores, out,
                                                                              tokens, size);
}

extern "C" void lookup(const char* kind, const void* rows, const float* scales, const long long* indices,
                       const void* scores, void* out, long long tokens, long long n, long long k, int d, int cores,
                       int blocks) {
  const Sizes size{n, k, d, d / cores, cores, blocks};
  const auto call = [&](auto function) { function(rows, scales, indices, scores, out, tokens, size); };
  switch (kind[0]) {
    case 'f': return call(run<float, float, float>);
    case 'h': return call(run<Half, Half, Half>);
    case 'b': return call(run<Bfloat, float, Bfloat>);
    case '8': return call(run<signed char, float, float>);
    case '4': return call(run<Int4Pair, Half, Half>);
  }
}
