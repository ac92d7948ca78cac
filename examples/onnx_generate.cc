// Greedy tokens from an exported model, in C++: ONNX Runtime, with the plugin library of ultramem or without.
//
//   onnx_generate MODEL.onnx PLUGIN.so|- STEPS TOKEN...      prints STEPS tokens that follow the given ones
//
// `ultramem export RUN --to onnx --out DIR` writes the model. Build with the C API's header and ONNX Runtime's library in
// the folder RUNTIME: of a release, or a link of the name libonnxruntime.so.1 to the pip package's
// onnxruntime/capi/libonnxruntime.so.VERSION.
//
//   g++ -std=c++17 -O2 -I ultramem/ops/native/third_party/onnxruntime examples/onnx_generate.cc -o onnx_generate
//       -L RUNTIME -l:libonnxruntime.so.1 -Wl,-rpath,RUNTIME
//
// The plugin's file is what this prints:
//
//   python -c 'from ultramem.export.onnx_plugin import find_plugin; print(find_plugin().file)'
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

static const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "error: %s\n", ort->GetErrorMessage(status));
  std::exit(1);
}

// The model, and the cache that its outputs leave for its next inputs.
class Model {
 public:
  Model(const char* file, const char* plugin) {
    OrtEnv* env = nullptr;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "onnx_generate", &env));
    OrtSessionOptions* options = nullptr;
    check(ort->CreateSessionOptions(&options));
    if (std::strcmp(plugin, "-") != 0) check(ort->RegisterCustomOpsLibrary_V2(options, plugin));
    check(ort->CreateSession(env, file, options, &session_));
    check(ort->GetAllocatorWithDefaultOptions(&allocator_));
    std::size_t count = 0;
    check(ort->SessionGetInputCount(session_, &count));
    for (std::size_t i = 0; i < count; ++i) add_input(i);
    check(ort->SessionGetOutputCount(session_, &count));
    for (std::size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      check(ort->SessionGetOutputName(session_, i, allocator_, &name));
      outputs_.push_back(name);
    }
  }

  // The most likely token after these, which follow those of earlier calls.
  std::int64_t next(std::vector<std::int64_t> tokens) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    std::vector<std::int64_t> positions, mask(static_cast<std::size_t>(past_ + count), 1);
    for (std::int64_t i = 0; i < count; ++i) positions.push_back(past_ + i);
    set("input_ids", integers(tokens));
    set("attention_mask", integers(mask));
    set("position_ids", integers(positions));

    std::vector<const char*> names;
    std::vector<const OrtValue*> values;
    for (const auto& [name, value] : inputs_) {
      names.push_back(name.c_str());
      values.push_back(value);
    }
    std::vector<OrtValue*> results(outputs_.size(), nullptr);
    check(ort->Run(session_, nullptr, names.data(), values.data(), values.size(), outputs_.data(), outputs_.size(),
                   results.data()));
    past_ += count;
    std::int64_t best = 0;
    for (std::size_t i = 0; i < results.size(); ++i) {
      const std::string name = outputs_[i];
      if (name == "logits") {
        best = best_of_last(results[i]);
        ort->ReleaseValue(results[i]);
      } else if (name.rfind("present_conv.", 0) == 0) {
        set("past_conv." + name.substr(std::strlen("present_conv.")), results[i]);
      } else {
        set("past_key_values." + name.substr(std::strlen("present.")), results[i]);
      }
    }
    return best;
  }

 private:
  // An empty cache to begin with: the batch is 1, every other free size is the number of cached tokens.
  void add_input(std::size_t index) {
    char* name = nullptr;
    check(ort->SessionGetInputName(session_, index, allocator_, &name));
    OrtTypeInfo* type = nullptr;
    check(ort->SessionGetInputTypeInfo(session_, index, &type));
    const OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort->CastTypeInfoToTensorInfo(type, &info));
    ONNXTensorElementDataType element;
    check(ort->GetTensorElementType(info, &element));
    std::size_t rank = 0;
    check(ort->GetDimensionsCount(info, &rank));
    std::vector<std::int64_t> shape(rank);
    check(ort->GetDimensions(info, shape.data(), rank));
    ort->ReleaseTypeInfo(type);
    if (std::strncmp(name, "past_", 5) != 0) return;
    if (element != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      std::fprintf(stderr, "error: %s is not float32: export the model in float32\n", name);
      std::exit(1);
    }
    for (std::size_t axis = 0; axis < rank; ++axis) shape[axis] = shape[axis] >= 0 ? shape[axis] : axis == 0 ? 1 : 0;
    OrtValue* value = nullptr;
    check(ort->CreateTensorAsOrtValue(allocator_, shape.data(), rank, element, &value));
    void* data = nullptr;
    check(ort->GetTensorMutableData(value, &data));
    std::size_t elements = 1;
    for (const std::int64_t size : shape) elements *= static_cast<std::size_t>(size);
    if (elements > 0) std::memset(data, 0, elements * sizeof(float));
    set(name, value);
  }

  // [1, count] int64 with memory of its own.
  OrtValue* integers(const std::vector<std::int64_t>& numbers) {
    const std::int64_t shape[2] = {1, static_cast<std::int64_t>(numbers.size())};
    OrtValue* value = nullptr;
    check(ort->CreateTensorAsOrtValue(allocator_, shape, 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
    void* data = nullptr;
    check(ort->GetTensorMutableData(value, &data));
    std::copy(numbers.begin(), numbers.end(), static_cast<std::int64_t*>(data));
    return value;
  }

  void set(const std::string& name, OrtValue* value) {
    if (OrtValue*& old = inputs_[name]; old != value) {
      if (old != nullptr) ort->ReleaseValue(old);
      old = value;
    }
  }

  // Of logits [1, count, vocabulary].
  static std::int64_t best_of_last(OrtValue* logits) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort->GetTensorTypeAndShape(logits, &info));
    std::int64_t shape[3] = {};
    check(ort->GetDimensions(info, shape, 3));
    ort->ReleaseTensorTypeAndShapeInfo(info);
    void* data = nullptr;
    check(ort->GetTensorMutableData(logits, &data));
    const float* last = static_cast<const float*>(data) + (shape[1] - 1) * shape[2];
    return std::max_element(last, last + shape[2]) - last;
  }

  OrtSession* session_ = nullptr;
  OrtAllocator* allocator_ = nullptr;
  std::map<std::string, OrtValue*> inputs_;
  std::vector<const char*> outputs_;
  std::int64_t past_ = 0;
};

int main(int count, char** words) {
  if (count < 5 || ort == nullptr) {
    std::fprintf(stderr, ort ? "usage: %s MODEL.onnx PLUGIN.so|- STEPS TOKEN...\n" : "%s needs ONNX Runtime 1.21\n", words[0]);
    return 2;
  }
  Model model(words[1], words[2]);
  std::vector<std::int64_t> tokens;
  for (int i = 4; i < count; ++i) tokens.push_back(std::atoll(words[i]));
  for (int step = std::atoi(words[3]); step > 0; --step) {
    const std::int64_t token = model.next(tokens);  // the prompt at once, then token by token
    std::printf("%lld%c", static_cast<long long>(token), step > 1 ? ' ' : '\n');
    tokens = {token};
  }
}
