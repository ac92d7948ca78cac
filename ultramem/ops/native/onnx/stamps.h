// Node Stamp: passes a tensor on and notes the time. A profile puts one behind every node of a graph.
#pragma once

#include <time.h>

#include <cstring>

#include "op.h"

namespace ultramem::ort {

// Where stamps go, three numbers each: the node's place, and the nanoseconds at which it was entered and left.
struct StampRecord {
  std::int64_t* to = nullptr;
  std::size_t capacity = 0;  // of stamps; later ones are counted and not written
  std::size_t count = 0;
};
inline StampRecord stamp_record;

class Stamp {
 public:
  static constexpr const char* kName = "Stamp";
  static constexpr const char* kProvider = kCpu;
  static constexpr std::array kInputs{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED};  // any type, and the same comes out
  static constexpr std::array kOutputs{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED};

  explicit Stamp(const Attributes& attributes) : place_(attributes.integer("place")) {}

  void compute(const Context& context) const {
    const std::int64_t entered = now();
    const Input input = context.input(0, "tensor");
    auto* output = context.output<char>(0, input.shape);
    // The output is the input's own memory, but where the runtime has a place of its own for it.
    if (output != input.data) std::memcpy(output, input.data, input.count() * element_bytes(context.input_type(0)));
    if (stamp_record.to == nullptr) return;
    if (stamp_record.count < stamp_record.capacity) {
      std::int64_t* to = stamp_record.to + 3 * stamp_record.count;
      to[0] = place_;
      to[1] = entered;
      to[2] = now();
    }
    ++stamp_record.count;
  }

 private:
  static std::size_t element_bytes(Type type) {
    switch (type) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
        return 1;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16:
        return 2;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32:
        return 4;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64:
        return 8;
      default:
        fail("tensor must be of booleans or numbers, got type ", static_cast<int>(type));
    }
  }

  // CLOCK_MONOTONIC, as time.perf_counter_ns of Python on Linux.
  static std::int64_t now() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return std::int64_t{1000000000} * time.tv_sec + time.tv_nsec;
  }

  std::int64_t place_;
};

// The op of a node that may give its input's memory as its output.
struct StampOp : Op<Stamp> {
  explicit StampOp(int threads) : Op<Stamp>(threads) {
    GetAliasMap = [](int** inputs, int** outputs) -> std::size_t {
      static int first = 0;
      *inputs = *outputs = &first;
      return 1;
    };
    ReleaseAliasMap = [](int*, int*) {};
  }
};

}  // namespace ultramem::ort
