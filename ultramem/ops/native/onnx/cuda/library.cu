// The lookups of the plugin library on ONNX Runtime's CUDA provider. The library for the CPU loads this one, which stands
// beside it, for sessions that ask for the device.
#include <cuda_runtime.h>

#include <limits>

#include "../../elements.h"
#include "../lookup_shapes.h"
#include "../op.h"
#include "lookup_kernel.cuh"

namespace ultramem::ort {
namespace {

// What a type of the kernel is to ONNX.
template <class Element>
constexpr Type kCudaType = kType<Element>;
template <>
constexpr Type kCudaType<cuda::Half> = kType<float16>;
template <>
constexpr Type kCudaType<cuda::Bfloat> = kType<bfloat16>;
template <>
constexpr Type kCudaType<signed char> = kType<std::int8_t>;
template <>
constexpr Type kCudaType<cuda::Int4Pair> = kType<std::uint8_t>;

template <bool kWide, class Stored, class Score, class Out>
void launch_as(const Context& context, const LookupSizes& size, const Stored* rows, const float* scales,
               const std::int64_t* indices, const Score* scores, Out* out) {
  constexpr std::int64_t part = std::int64_t{cuda::kThreads} * cuda::kThreadColumns<Stored, kWide>;
  const std::int64_t parts = (size.d + part - 1) / part, most = std::numeric_limits<int>::max();
  if (size.t > most || size.d > most || size.e > 65535 || parts > 65535) {
    fail("a GPU takes at most 2^31 - 1 tokens, 65535 blocks and ", std::min(most, 65535 * part), " columns");
  }
  const dim3 grid(static_cast<unsigned>(size.t), static_cast<unsigned>(size.e), static_cast<unsigned>(parts));
  const auto d = static_cast<int>(size.d), c = static_cast<int>(size.c);
  const cuda::Sizes sizes{size.n, size.k, d, d / c, c, static_cast<int>(size.e)};
  cuda::lookup_reduce<Stored, Score, Out, kWide>
      <<<grid, cuda::kThreads, 0, static_cast<cudaStream_t>(context.gpu_stream())>>>(
          rows, scales, reinterpret_cast<const cuda::Int64*>(indices), scores, out, sizes);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

template <class Stored, class Score, class Out>
void launch(const Context& context, const LookupSizes& size, const Stored* rows, const float* scales,
            const std::int64_t* indices, const Score* scores, Out* out) {
  if (size.t == 0 || size.d == 0) return;
  const bool wide = size.d / size.c % cuda::kThreadColumns<Stored, true> == 0;
  (wide ? launch_as<true, Stored, Score, Out> : launch_as<false, Stored, Score, Out>)(context, size, rows, scales,
                                                                                     indices, scores, out);
}

template <class Value, class Score>
class CudaLookupReduce {
 public:
  static constexpr const char* kName = "LookupReduce";
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr std::array kInputs{kCudaType<Value>, kType<std::int64_t>, kCudaType<Score>};
  static constexpr std::array kOutputs{kCudaType<Value>};

  explicit CudaLookupReduce(const Attributes& attributes) : blocks_(attributes.at_least_one("num_blocks")) {}

  void compute(const Context& context) const {
    const Input values = context.input(0, "values", 2), indices = context.input(1, "indices", 2);
    const Input scores = context.input(2, "scores", 3);
    const LookupSizes size = lookup_sizes(values, indices, scores, blocks_, values[1], false);
    launch(context, size, values.read<Value>(), nullptr, indices.read<std::int64_t>(), scores.read<Score>(),
           context.output<Value>(0, {size.t, size.e, size.d}));
  }

 private:
  std::int64_t blocks_;
};

template <class Stored, class Score>
class CudaLookupReduceQuantized {
  static constexpr bool kPacked = std::is_same_v<Stored, cuda::Int4Pair>;

 public:
  static constexpr const char* kName = "LookupReduceQuantized";
  static constexpr const char* kProvider = "CUDAExecutionProvider";
  static constexpr std::array kInputs{kCudaType<Stored>, kType<float>, kType<std::int64_t>, kCudaType<Score>};
  static constexpr std::array kOutputs{kCudaType<Score>};

  explicit CudaLookupReduceQuantized(const Attributes& attributes) : blocks_(attributes.at_least_one("num_blocks")) {
    require_bits(attributes, kPacked);
  }

  void compute(const Context& context) const {
    const Input rows = context.input(0, "rows", 2), scales = context.input(1, "scales", 1);
    const Input indices = context.input(2, "indices", 2), scores = context.input(3, "scores", 3);
    scales.require_shape({rows[0]}, "the rows of rows");
    const LookupSizes size = lookup_sizes(rows, indices, scores, blocks_, rows[1] * (kPacked ? 2 : 1), kPacked);
    launch(context, size, rows.read<Stored>(), scales.read<float>(), indices.read<std::int64_t>(),
           scores.read<Score>(), context.output<Score>(0, {size.t, size.e, size.d}));
  }

 private:
  std::int64_t blocks_;
};

}  // namespace
}  // namespace ultramem::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* UltramemAddCudaOps(OrtCustomOpDomain* domain,
                                                                                const OrtApi* given) {
  using namespace ultramem;
  using namespace ultramem::ort;
  api = given;
  return guarded("UltramemAddCudaOps", [&] {
    static auto& ops = *new Ops(1);  // never destroyed: sessions hold pointers into it
    ops.add<CudaLookupReduce<float, float>, CudaLookupReduce<cuda::Half, cuda::Half>,
            CudaLookupReduce<cuda::Bfloat, cuda::Bfloat>, CudaLookupReduce<cuda::Half, float>,
            CudaLookupReduce<cuda::Bfloat, float>>(domain);
    ops.add<CudaLookupReduceQuantized<signed char, float>, CudaLookupReduceQuantized<signed char, cuda::Half>,
            CudaLookupReduceQuantized<signed char, cuda::Bfloat>, CudaLookupReduceQuantized<cuda::Int4Pair, float>,
            CudaLookupReduceQuantized<cuda::Int4Pair, cuda::Half>,
            CudaLookupReduceQuantized<cuda::Int4Pair, cuda::Bfloat>>(domain);
  });
}
