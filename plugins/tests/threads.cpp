// The ONNX Runtime operator in many threads, for ThreadSanitizer. ONNX Runtime itself is not instrumented, and its locks would not
// be seen; so this program stands in for it: a table of functions as abi.h places them, tensors, and a thread pool of plain threads.
//
//     sdct_threads           everything that may happen at once; exits 1 where a result differs from that of one thread
//     sdct_threads --race    the same, but a slot is written while requests read it: a race, which must be reported
//
// At once: the library is registered by several sessions, kernels of equal and other lengths are made and destroyed (tables are
// shared, the first calls choose the instruction set), one kernel serves several requests with parallel loops of their own, and the
// host writes a bank slot that no running request holds.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../onnxruntime/abi.h"

namespace sdct::ort {

struct Status {
  std::string message;
};
struct CustomOpDomain {
  const CustomOp* op = nullptr;
};
struct TensorInfo {
  ElementType type;
  std::vector<int64_t> dims;
};
struct Value {
  ElementType type = ElementType::kFloat;
  std::vector<int64_t> dims;
  std::vector<unsigned char> bytes;
};
struct KernelInfo {
  int64_t d_in;
  std::vector<int64_t> d_out, capacity;
};
struct KernelContext {
  std::vector<const Value*> inputs;
  std::vector<Value> outputs;
};
struct SessionOptions {};

}  // namespace sdct::ort

extern "C" sdct::ort::Status* RegisterCustomOps(sdct::ort::SessionOptions* options, const sdct::ort::ApiBase* base);

namespace {

using namespace sdct::ort;

constexpr int kThreads = 4, kRounds = 12;
constexpr int64_t kRows = 3, kTokens = 7, kSlots = 4;  // requests hold slots 1 and 2, the host writes slot 3

std::atomic<int> failures{0};

void expect(bool good, const char* what) {
  if (!good && failures++ == 0) std::fprintf(stderr, "sdct_threads: %s\n", what);
}

void expect(const Status* status) {
  if (status) expect(false, status->message.c_str());
}

void* table[kApiEntries];
std::atomic<const CustomOp*> registered{nullptr};

template <class Function>
void place(size_t at, Function* function) {
  std::memcpy(&table[at], &function, sizeof function);
}

Status* copy_ints(const std::vector<int64_t>& source, int64_t* out, size_t* count) {
  if (out) std::copy(source.begin(), source.end(), out);
  *count = source.size();
  return nullptr;
}

void fill_table() {
  place(0, +[](ErrorCode, const char* message) { return new Status{message}; });
  place(26, +[](const char*, CustomOpDomain** out) -> Status* { return *out = new CustomOpDomain, nullptr; });
  place(27, +[](CustomOpDomain* domain, const CustomOp* op) -> Status* { return domain->op = op, nullptr; });
  place(28, +[](SessionOptions*, CustomOpDomain* domain) -> Status* { return registered = domain->op, nullptr; });
  place(51, +[](Value* value, void** data) -> Status* { return *data = value->bytes.data(), nullptr; });
  place(60, +[](const TensorInfo* info, ElementType* type) -> Status* { return *type = info->type, nullptr; });
  place(61, +[](const TensorInfo* info, size_t* rank) -> Status* { return *rank = info->dims.size(), nullptr; });
  place(62, +[](const TensorInfo* info, int64_t* dims, size_t rank) -> Status* { return copy_ints(info->dims, dims, &rank); });
  place(65, +[](const Value* value, TensorInfo** out) -> Status* {
    return *out = new TensorInfo{value->type, value->dims}, nullptr;
  });
  place(86, +[](const KernelInfo* info, const char*, int64_t* out) -> Status* { return *out = info->d_in, nullptr; });
  place(90, +[](const KernelContext* context, size_t i, const Value** out) -> Status* {
    return *out = context->inputs[i], nullptr;
  });
  place(91, +[](KernelContext* context, size_t i, const int64_t* dims, size_t rank, Value** out) -> Status* {
    Value& value = context->outputs[i];
    value.dims.assign(dims, dims + rank);
    value.bytes.resize(context->inputs[5 + i]->bytes.size());
    return *out = &value, nullptr;
  });
  place(99, +[](TensorInfo* info) { delete info; });
  place(101, +[](CustomOpDomain* domain) { delete domain; });
  place(163, +[](const KernelInfo* info, const char* name, int64_t* out, size_t* count) -> Status* {
    return copy_ints(std::strcmp(name, "d_out") == 0 ? info->d_out : info->capacity, out, count);
  });
  place(230, +[](const KernelInfo* info, size_t* out) -> Status* { return *out = 5 + info->d_out.size(), nullptr; });
  place(231, +[](const KernelInfo* info, size_t* out) -> Status* { return *out = info->d_out.size(), nullptr; });
  place(244, +[](const KernelInfo*, char* name, size_t* length) -> Status* {
    if (name) *name = '\0';
    return *length = 1, nullptr;
  });
  place(274, +[](const KernelContext*, void (*body)(void*, size_t), size_t count, size_t, void* context) -> Status* {
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i; (i = next++) < count;) body(context, i);
    };
    std::thread other(work);
    work();
    other.join();
    return nullptr;
  });
}

const ApiBase base{[](uint32_t) noexcept { return reinterpret_cast<const Table*>(table); },
                   []() noexcept -> const char* { return "1.18.0"; }};

template <class T, class Make>
Value tensor(ElementType type, std::vector<int64_t> dims, Make make) {
  Value value{type, dims, {}};
  int64_t size = 1;
  for (const int64_t d : dims) size *= d;
  std::vector<T> numbers(size);
  for (int64_t i = 0; i < size; ++i) numbers[i] = T(make(i));
  value.bytes.resize(size * sizeof(T));
  std::memcpy(value.bytes.data(), numbers.data(), value.bytes.size());
  return value;
}

// A node with its inputs, all of which are read only but for slot 3 of the bank.
struct Node {
  explicit Node(KernelInfo shape) : info(std::move(shape)) {
    std::mt19937 random(uint32_t(info.d_in));
    std::normal_distribution<float> normal;
    const auto number = [&](int64_t) { return normal(random); };
    int64_t n = 0;
    for (const int64_t c : info.capacity) n += c;
    inputs.push_back(tensor<float>(ElementType::kFloat, {kRows, kTokens, info.d_in}, number));
    inputs.push_back(tensor<int32_t>(ElementType::kInt32, {kRows, 2}, [](int64_t i) { return i % 3; }));
    inputs.push_back(tensor<float>(ElementType::kFloat, {kRows, 2}, number));
    inputs.push_back(tensor<float>(ElementType::kFloat, {kSlots, n}, number));
    std::vector<int32_t> places;
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      for (size_t j = 0; j < info.d_out.size(); ++j) {
        for (int64_t k = 0; k < info.capacity[j]; ++k) {
          places.push_back(int32_t(k * info.d_out[j] / info.capacity[j]));  // rows ascend
          places.push_back(int32_t((k * 7 + slot) % info.d_in));
        }
      }
    }
    inputs.push_back(tensor<int32_t>(ElementType::kInt32, {kSlots, n, 2}, [&](int64_t i) { return places[i]; }));
    for (const int64_t d : info.d_out) inputs.push_back(tensor<float>(ElementType::kFloat, {kRows, kTokens, d}, number));
  }

  void* make_kernel() const {
    void* kernel = nullptr;
    expect(registered.load()->CreateKernelV2(registered, reinterpret_cast<const Table*>(table), &info, &kernel));
    return kernel;
  }

  std::vector<Value> run(void* kernel) const {
    KernelContext context;
    for (const Value& value : inputs) context.inputs.push_back(&value);
    context.outputs.resize(info.d_out.size());
    expect(registered.load()->KernelComputeV2(kernel, &context));
    return std::move(context.outputs);
  }

  void write_slot(int64_t slot, float number) {
    Value& values = inputs[3];
    auto* first = reinterpret_cast<float*>(values.bytes.data()) + slot * values.dims[1];
    for (int64_t i = 0; i < values.dims[1]; ++i) first[i] = number;
  }

  KernelInfo info;
  std::vector<Value> inputs;
};

void in_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) threads.emplace_back(body, t);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const bool race = argc > 1 && std::strcmp(argv[1], "--race") == 0;
  fill_table();
  in_threads(kThreads, [](int) {
    SessionOptions options;
    expect(RegisterCustomOps(&options, &base));
  });
  if (!registered.load()) return 1;

  // a prime, powers of two that run in lanes and singly, and lengths that two nodes share
  std::vector<Node> nodes;
  nodes.emplace_back(KernelInfo{96, {64, 13}, {20, 9}});
  nodes.emplace_back(KernelInfo{13, {96}, {11}});
  nodes.emplace_back(KernelInfo{3072, {64}, {30}});
  std::vector<void*> kernels(nodes.size());
  in_threads(int(nodes.size()), [&](int n) { kernels[n] = nodes[n].make_kernel(); });
  if (failures) return 1;

  std::vector<std::vector<std::vector<Value>>> found(kThreads);
  std::atomic<bool> done{false};
  std::thread host([&] {
    for (float number = 0; !done; ++number) {
      for (Node& node : nodes) node.write_slot(race ? 1 : 3, number);
    }
  });
  in_threads(kThreads, [&](int t) {
    for (int round = 0; round < kRounds; ++round) {
      for (size_t n = 0; n < nodes.size(); ++n) {
        found[t].push_back(nodes[n].run(kernels[n]));
        void* own = nodes[(n + t) % nodes.size()].make_kernel();  // another session's, of the same lengths
        registered.load()->KernelDestroy(own);
      }
    }
  });
  done = true;
  host.join();

  if (!race) {
    for (size_t n = 0; n < nodes.size(); ++n) {
      const std::vector<Value> alone = nodes[n].run(kernels[n]);
      for (size_t j = 0; j < alone.size(); ++j) {
        expect(alone[j].bytes != nodes[n].inputs[5 + j].bytes, "the adapters changed nothing");
        for (const auto& results : found) {
          for (size_t i = n; i < results.size(); i += nodes.size()) {
            expect(results[i][j].bytes == alone[j].bytes, "a result differs from that of one thread");
          }
        }
      }
    }
  }
  for (size_t n = 0; n < nodes.size(); ++n) registered.load()->KernelDestroy(kernels[n]);
  return failures ? 1 : 0;
}
