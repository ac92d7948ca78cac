// The plugin library of ONNX Runtime: kernels of the nodes of domain `ultramem`, for every type that a node may have.
#include <dlfcn.h>

#include <filesystem>
#include <map>
#include <mutex>
#include <thread>

#include "lookups.h"
#include "permutes.h"
#include "selects.h"
#include "stamps.h"

// What SessionOptions.register_custom_ops_library of every language calls.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base);

// From now on stamps go to `to`, three numbers each, `capacity` of them at most; null: nowhere. Returns how many came
// since the call before.
extern "C" __attribute__((visibility("default"))) std::size_t UltramemStampsTo(std::int64_t* to, std::size_t capacity);

namespace ultramem::ort {
namespace {

constexpr const char* kDomain = "ultramem";
// Of the session options: how many threads the session has. Work is cut for as many; all of the machine's if unset.
constexpr const char* kThreadsEntry = "ultramem.intra_op_num_threads";
// Of the session options: "cpu" (as if it were unset) for kernels of every node, or "cuda" for those of the lookups alone,
// so that the nodes around them run their standard operators on the GPU too.
constexpr const char* kDeviceEntry = "ultramem.device";

// The instructions that this file was compiled for.
bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

// An entry of the session options; empty if it is not there.
std::string entry(const OrtSessionOptions* options, const char* name) {
  int has = 0;
  check(api->HasSessionConfigEntry(options, name, &has));
  if (!has) return {};
  std::size_t size = 0;
  check(api->GetSessionConfigEntry(options, name, nullptr, &size));
  std::string text(size, '\0');
  check(api->GetSessionConfigEntry(options, name, text.data(), &size));
  return text.c_str();  // without the zero at its end
}

int threads_of(const OrtSessionOptions* options) {
  const std::string text = entry(options, kThreadsEntry);
  if (text.empty()) return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int threads = std::atoi(text.c_str());
  if (threads < 1) fail(kThreadsEntry, " must be a number of at least 1, got '", text, "'");
  return threads;
}

bool on_gpu(const OrtSessionOptions* options) {
  const std::string device = entry(options, kDeviceEntry);
  if (!device.empty() && device != "cpu" && device != "cuda") {
    fail(kDeviceEntry, " must be one of cpu, cuda, got '", device, "'");
  }
  return device == "cuda";
}

// The library with the kernels for GPUs stands beside this one.
#if !defined(ULTRAMEM_CUDA_LIBRARY)
#define ULTRAMEM_CUDA_LIBRARY ""
#endif

void add_cuda_ops(OrtCustomOpDomain* domain) {
  Dl_info self{};
  if (!dladdr(reinterpret_cast<void*>(&RegisterCustomOps), &self)) throw std::runtime_error("where is this library?");
  const std::filesystem::path file = std::filesystem::path(self.dli_fname).replace_filename(ULTRAMEM_CUDA_LIBRARY);
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  using AddOps = OrtStatus*(OrtCustomOpDomain*, const OrtApi*);
  auto* add_ops = reinterpret_cast<AddOps*>(dlsym(library, "UltramemAddCudaOps"));
  if (add_ops == nullptr) throw std::runtime_error(dlerror());
  check(add_ops(domain, api));
}

struct Registration {
  Registration(int threads, bool gpu) : ops(threads) {
    check(api->CreateCustomOpDomain(kDomain, &domain));
    if (gpu) {
      add_cuda_ops(domain);
      return;
    }
    ops.add<LookupReduce<float, float>, LookupReduce<double, double>, LookupReduce<float16, float16>,
            LookupReduce<bfloat16, bfloat16>, LookupReduce<float16, float>, LookupReduce<bfloat16, float>>(domain);
    ops.add<LookupReduceQuantized<Int8Rows, float>, LookupReduceQuantized<Int8Rows, float16>,
            LookupReduceQuantized<Int8Rows, bfloat16>, LookupReduceQuantized<Int4Rows, float>,
            LookupReduceQuantized<Int4Rows, float16>, LookupReduceQuantized<Int4Rows, bfloat16>>(domain);
    ops.add<LookupDot<float>, LookupDot<double>, LookupDot<float16>, LookupDot<bfloat16>>(domain);
    ops.add<PermuteAddresses>(domain);
    ops.add<ProductTopK<float>, ProductTopK<double>, ProductTopK<float16>, ProductTopK<bfloat16>>(domain);
    ops.add<TuckerTopK<float>, TuckerTopK<double>, TuckerTopK<float16>, TuckerTopK<bfloat16>>(domain);
    ops.add_op<StampOp>(domain);
  }

  Ops ops;
  OrtCustomOpDomain* domain = nullptr;
};

}  // namespace
}  // namespace ultramem::ort

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace ultramem::ort;
  static std::mutex mutex;
  static auto& registrations = *new std::map<std::pair<int, bool>, Registration>;  // never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const std::string message = std::string("ultramem's kernels need ONNX Runtime 1.") +
                                std::to_string(ORT_API_VERSION) + " or newer, this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_FAIL, message.c_str());
  }
  if (!runs_here()) {
    return api->CreateStatus(ORT_FAIL, "these kernels of ultramem were built for instructions that this processor lacks");
  }
  return guarded("RegisterCustomOps", [&] {
    const int threads = threads_of(options);
    const bool gpu = on_gpu(options);
    const auto [found, made] = registrations.try_emplace({threads, gpu}, threads, gpu);
    check(api->AddCustomOpDomain(options, found->second.domain));
  });
}

std::size_t UltramemStampsTo(std::int64_t* to, std::size_t capacity) {
  auto& record = ultramem::ort::stamp_record;
  const std::size_t count = record.count;
  record = {to, capacity, 0};
  return count;
}
