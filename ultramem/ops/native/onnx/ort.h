// ONNX Runtime's C API as the kernels see it: attributes, inputs, outputs, threads, errors of one line.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../elements.h"
#include "../third_party/onnxruntime/onnxruntime_c_api.h"

namespace ultramem::ort {

// Of the runtime that loaded this library.
inline const OrtApi* api = nullptr;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// What f() throws, as a status: no exception may reach the runtime.
template <class F>
OrtStatus* guarded(const char* op, const F& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, (std::string("ultramem.") + op + ": " + error.what()).c_str());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, (std::string("ultramem.") + op + ": " + error.what()).c_str());
  }
}

using Type = ONNXTensorElementDataType;

template <class Element>
constexpr Type kType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
template <>
inline constexpr Type kType<float> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
template <>
inline constexpr Type kType<double> = ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
template <>
inline constexpr Type kType<float16> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
template <>
inline constexpr Type kType<bfloat16> = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
template <>
inline constexpr Type kType<std::int8_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
template <>
inline constexpr Type kType<std::uint8_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
template <>
inline constexpr Type kType<std::int64_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// Attributes of a node.
class Attributes {
 public:
  explicit Attributes(const OrtKernelInfo* info) : info_(info) {}

  std::int64_t integer(const char* name) const {
    std::int64_t value = 0;
    check(api->KernelInfoGetAttribute_int64(info_, name, &value));
    return value;
  }

  std::int64_t at_least_one(const char* name) const {
    const std::int64_t value = integer(name);
    if (value < 1) fail(name, " must be at least 1, got ", value);
    return value;
  }

  std::vector<std::int64_t> integers(const char* name) const {
    std::size_t count = 0;
    check(api->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &count));
    std::vector<std::int64_t> values(count);
    check(api->KernelInfoGetAttributeArray_int64(info_, name, values.data(), &count));
    return values;
  }

  std::string text(const char* name) const {
    std::size_t size = 0;
    check(api->KernelInfoGetAttribute_string(info_, name, nullptr, &size));
    std::string value(size, '\0');
    check(api->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(size ? size - 1 : 0);  // without the zero at its end
    return value;
  }

 private:
  const OrtKernelInfo* info_;
};

using Shape = std::vector<std::int64_t>;

// A tensor that comes in.
struct Input {
  const char* name;
  Shape shape;
  const void* data;

  std::int64_t operator[](std::size_t axis) const { return shape[axis]; }

  std::int64_t count() const {
    std::int64_t product = 1;
    for (const std::int64_t size : shape) product *= size;
    return product;
  }

  template <class Element>
  const Element* read() const {
    return static_cast<const Element*>(data);
  }

  // Raise unless the shape is this one; `rule` says where it comes from.
  void require_shape(const Shape& expected, const char* rule) const {
    if (shape != expected) fail(name, " must have shape ", text(expected), " (", rule, "), got ", text(shape));
  }

  static std::string text(const Shape& shape) {
    std::ostringstream to;
    to << '(';
    for (std::size_t i = 0; i < shape.size(); ++i) to << (i ? ", " : "") << shape[i];
    to << ')';
    return to.str();
  }
};

// One call of a kernel.
class Context {
 public:
  Context(OrtKernelContext* context, int threads) : context_(context), threads_(threads) {}

  // Input `index`; its type is the one that the op was registered for.
  Input input(std::size_t index, const char* name, std::size_t rank) const {
    const Input input = this->input(index, name);
    if (input.shape.size() != rank) fail(name, " must have rank ", rank, ", got shape ", Input::text(input.shape));
    return input;
  }

  Input input(std::size_t index, const char* name) const {
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context_, index, &value));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    std::size_t rank = 0;
    OrtStatus* status = api->GetDimensionsCount(info, &rank);
    Input input{name, Shape(rank), nullptr};
    if (status == nullptr) status = api->GetDimensions(info, input.shape.data(), rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    void* data = nullptr;  // the API has no reader of constants
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    input.data = data;
    return input;
  }

  Type input_type(std::size_t index) const {
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context_, index, &value));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    Type type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    OrtStatus* status = api->GetTensorElementType(info, &type);
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    return type;
  }

  template <class Element>
  Element* output(std::size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api->GetTensorMutableData(value, &data));
    return static_cast<Element*>(data);
  }

  // Of the CUDA provider: where kernels are launched.
  void* gpu_stream() const {
    void* stream = nullptr;
    check(api->KernelContext_GetGPUComputeStream(context_, &stream));
    return stream;
  }

  // The session's own pool, as kernels take threads: f(begin, end) over [0, count) in pieces of `grain` at least.
  int threads() const { return threads_; }

  template <class F>
  void operator()(std::int64_t count, std::int64_t grain, const F& f) const {
    const std::int64_t pieces = std::min<std::int64_t>(threads_, (count + grain - 1) / grain);
    if (pieces <= 1) {
      if (count > 0) f(std::int64_t{0}, count);
      return;
    }
    struct Job {
      const F& f;
      std::int64_t count, pieces;
      std::atomic<bool> failed{false};
    } job{f, count, pieces};
    check(api->KernelContext_ParallelFor(
        context_,
        [](void* given, std::size_t piece) noexcept {
          Job& job = *static_cast<Job*>(given);
          const auto i = static_cast<std::int64_t>(piece);
          try {
            job.f(job.count * i / job.pieces, job.count * (i + 1) / job.pieces);
          } catch (const std::exception&) {  // there is one that the kernels can throw: out of memory
            job.failed = true;
          }
        },
        static_cast<std::size_t>(pieces), 0, &job));
    if (job.failed) throw std::bad_alloc();
  }

 private:
  OrtKernelContext* context_;
  int threads_;
};

}  // namespace ultramem::ort
