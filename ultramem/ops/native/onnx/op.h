// From a kernel class to what ONNX Runtime registers.
#pragma once

#include <memory>

#include "ort.h"

namespace ultramem::ort {

constexpr const char* kCpu = "CPUExecutionProvider";

// Kernel: `kName`, `kProvider` of its device, `kInputs` and `kOutputs` (their types, in order), a constructor from
// Attributes that raises for those that cannot be, and `compute(const Context&) const`.
template <class Kernel>
struct Op : OrtCustomOp {
  explicit Op(int threads) : OrtCustomOp{}, threads(threads) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return Kernel::kProvider; };
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs.size(); };
    GetInputType = [](const OrtCustomOp*, std::size_t i) { return Kernel::kInputs[i]; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputs.size(); };
    GetOutputType = [](const OrtCustomOp*, std::size_t i) { return Kernel::kOutputs[i]; };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded(Kernel::kName, [&] {
        *kernel = new Node{Kernel(Attributes(info)), static_cast<const Op*>(op)->threads};
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded(Kernel::kName, [&] {
        const Node& node = *static_cast<const Node*>(kernel);
        node.kernel.compute(Context(context, node.threads));
      });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  }

  struct Node {
    Kernel kernel;
    int threads;
  };

  int threads;
};

// Ops for sessions of one number of threads. They live as long as the process: sessions hold pointers to them.
class Ops {
 public:
  explicit Ops(int threads) : threads_(threads) {}

  template <class... Kernels>
  void add(OrtCustomOpDomain* domain) {
    (add_op<Op<Kernels>>(domain), ...);
  }

  template <class OpOfKernel>
  void add_op(OrtCustomOpDomain* domain) {
    auto op = std::make_shared<OpOfKernel>(threads_);
    check(api->CustomOpDomain_Add(domain, op.get()));
    ops_.push_back(std::move(op));
  }

 private:
  int threads_;
  std::vector<std::shared_ptr<void>> ops_;
};

}  // namespace ultramem::ort
