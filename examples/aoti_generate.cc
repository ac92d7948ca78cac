// Greedy tokens from an exported model, in C++: AOTInductor, without Python.
//
//   aoti_generate DIR STEPS TOKEN...      prints STEPS tokens that follow the given ones
//
// `ultramem export RUN --to aoti --decode --out DIR` writes the folder; without --decode one graph does both the prompt and
// the steps. Build with the PyTorch that exported, in the folder that this prints:
//
//   python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)'
//
//   g++ -std=c++20 -O2 -I TORCH/include examples/aoti_generate.cc -o aoti_generate
//       -L TORCH/lib -Wl,-rpath,TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
//
// A package for a GPU (`--device cuda`) needs -ltorch_cuda -lc10_cuda there as well.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

// What JSON holds: a scalar as it is written (strings without quotes), or members, which have names in an object.
struct Json {
  std::string text;
  std::vector<std::pair<std::string, Json>> members;

  const Json& at(const std::string& name) const {
    for (const auto& [key, value] : members)
      if (key == name) return value;
    throw std::runtime_error("the manifest has no field " + name);
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json found;
    const char first = peek();
    if (first == '{' || first == '[') {
      ++at_;
      while (peek() != '}' && text_[at_] != ']') {
        std::string name;
        if (first == '{') {
          name = string();
          if (peek() != ':') throw std::runtime_error("not JSON");
          ++at_;
        }
        found.members.emplace_back(name, read());
        if (peek() == ',') ++at_;
      }
      ++at_;
    } else if (first == '"') {
      found.text = string();
    } else {
      while (at_ < text_.size() && !std::strchr(",]} \n\r\t", text_[at_])) found.text += text_[at_++];
    }
    return found;
  }

 private:
  char peek() {
    while (at_ < text_.size() && std::strchr(" \n\r\t", text_[at_])) ++at_;
    if (at_ >= text_.size()) throw std::runtime_error("JSON ends too early");
    return text_[at_];
  }

  std::string string() {
    std::string found;
    if (peek() != '"') throw std::runtime_error("not JSON");
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') ++at_;  // names and numbers need no more than this
      found += text_[at_];
    }
    ++at_;
    return found;
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

static at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"F32", at::kFloat},     {"F16", at::kHalf},     {"BF16", at::kBFloat16}, {"I64", at::kLong},
      {"I32", at::kInt},       {"I8", at::kChar},      {"U8", at::kByte},       {"BOOL", at::kBool},
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  return known.at(name);
}

using Weights = std::unordered_map<std::string, at::Tensor>;

// The tensors of a safetensors file, in its mapped pages: nothing is read before a graph does.
static Weights map_weights(const std::string& file) {
  const int descriptor = open(file.c_str(), O_RDONLY);
  if (descriptor < 0) return {};
  struct stat about {};
  fstat(descriptor, &about);
  auto* bytes = static_cast<char*>(
      mmap(nullptr, static_cast<std::size_t>(about.st_size), PROT_READ, MAP_PRIVATE, descriptor, 0));
  if (bytes == MAP_FAILED) throw std::runtime_error(file + " cannot be mapped");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes, sizeof length);
  if (sizeof length + length > static_cast<std::uint64_t>(about.st_size)) throw std::runtime_error(file + " is cut off");
  const std::string header(bytes + sizeof length, length);
  char* data = bytes + sizeof length + length;
  Weights found;
  for (const auto& [name, each] : JsonReader(header).read().members) {
    std::vector<std::int64_t> shape;
    for (const auto& [_, size] : each.at("shape").members) shape.push_back(std::stoll(size.text));
    const auto& offsets = each.at("data_offsets").members;
    if (data + std::stoll(offsets[1].second.text) > bytes + about.st_size)
      throw std::runtime_error(file + " is cut off");
    found[name] =
        at::from_blob(data + std::stoll(offsets[0].second.text), shape, dtype_of(each.at("dtype").text));
  }
  return found;
}

class Model {
 public:
  explicit Model(const std::string& folder) : weights_(map_weights(folder + "/model.safetensors")) {
    std::stringstream text;
    text << std::ifstream(folder + "/manifest.json").rdbuf();
    const std::string manifest_text = text.str();
    const Json manifest = JsonReader(manifest_text).read();
    const Json& options = manifest.at("options");
    if (options.at("device").text == "cuda") {
      device_ = at::kCUDA;
      for (auto& [_, weight] : weights_) weight = weight.to(device_);
    }
    prefill_ = load(folder, "model");
    if (options.at("decode").text == "true" && options.at("static").text == "null") decode_ = load(folder, "decode");
    const auto& inputs = manifest.at("inputs").members;
    for (std::size_t i = 3; i < inputs.size(); ++i) {  // after input_ids, attention_mask, position_ids
      std::vector<std::int64_t> shape;
      for (const auto& [_, size] : inputs[i].second.at("shape").members)
        shape.push_back(size.text == "batch" ? 1 : size.text == "past" ? 0 : std::stoll(size.text));
      state_.push_back(at::zeros(shape, at::device(device_).dtype(dtype_of(inputs[i].second.at("dtype").text))));
    }
  }

  // The most likely token after these, which follow those of earlier calls.
  std::int64_t next(const std::vector<std::int64_t>& tokens) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    std::vector<at::Tensor> inputs = {
        at::tensor(tokens, at::kLong).unsqueeze(0),
        at::ones({1, past_ + count}, at::kLong),
        at::arange(past_, past_ + count, at::kLong).unsqueeze(0)};
    for (auto& input : inputs) input = input.to(device_);
    inputs.insert(inputs.end(), state_.begin(), state_.end());
    auto& graph = count == 1 && decode_ ? *decode_ : *prefill_;
    std::vector<at::Tensor> outputs = graph.run(inputs);
    state_.assign(outputs.begin() + 1, outputs.end());
    past_ += count;
    return outputs[0].select(1, count - 1).argmax(-1).item<std::int64_t>();
  }

 private:
  using Graph = torch::inductor::AOTIModelPackageLoader;

  std::unique_ptr<Graph> load(const std::string& folder, const std::string& name) {
    auto graph = std::make_unique<Graph>(folder + "/model.pt2", name);
    if (!weights_.empty()) {
      Weights own;
      for (const std::string& each : graph->get_constant_fqns()) own[each] = weights_.at(each);
      graph->load_constants(own, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    }
    return graph;
  }

  at::Device device_ = at::kCPU;
  Weights weights_;  // the graphs point into them
  std::unique_ptr<Graph> prefill_, decode_;
  std::vector<at::Tensor> state_;
  std::int64_t past_ = 0;
};

int main(int count, char** words) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s DIR STEPS TOKEN...\n", words[0]);
    return 2;
  }
  try {
    const c10::InferenceMode no_gradients;
    Model model(words[1]);
    std::vector<std::int64_t> tokens;
    for (int i = 3; i < count; ++i) tokens.push_back(std::stoll(words[i]));
    for (int step = 0; step < std::stoi(words[2]); ++step) {
      tokens = {model.next(tokens)};
      std::printf("%lld\n", static_cast<long long>(tokens[0]));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
