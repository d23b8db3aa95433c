// How fast loop_lora_linear is on this CPU, without Python: medians over calls that each find their weights outside
// the cache. bench/kernels.py compares with PyTorch.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_isa.h"
#include "huge_pages.h"
#include "loop_lora/launch.h"
#include "packed_linear/launch.h"

using namespace rrt;
using namespace rrt::loop_lora;

namespace {

constexpr char kHelp[] =
    "Usage: bench_loop_lora [option value]...\n"
    "  --m LIST        rows, for example 1,2,4,8 (default 1,2,4,8,16,32,64)\n"
    "  --n N           outputs (2048)\n"
    "  --k K           inputs (2048)\n"
    "  --rank R        LoRA rank (128)\n"
    "  --loops B       loops, which the rows take in turn (2)\n"
    "  --dtype D       fp32, fp64, bf16 or fp16 (bf16)\n"
    "  --packed P      1: weights of pack_linear; 0: as they come (1)\n"
    "  --threads T     (1)\n"
    "  --samples S     timed calls per line (50)\n"
    "  --megabytes MB  weights to rotate through: several times the cache (512)\n"
    "RRT_CPU_ISA=baseline|avx2|avx512|avx512_bf16|amx_bf16 lowers the instruction set.\n"
    "GB/s counts the bytes of the weight and of the adapters of the batch's loops; GFLOP/s two per multiply-add.\n";

struct Options {
  std::vector<int64_t> m = {1, 2, 4, 8, 16, 32, 64};
  int64_t n = 2048, k = 2048, rank = 128, loops = 2, packed = 1, threads = 1, samples = 50, megabytes = 512;
  std::string dtype = "bf16";
};

[[noreturn]] void fail(const std::string& name, const std::string& found, const std::string& expected) {
  std::fprintf(stderr, "bench_loop_lora: %s: found '%s'; expected %s\n", name.c_str(), found.c_str(),
               expected.c_str());
  std::exit(2);
}

int64_t parse_integer(const std::string& name, const std::string& text, int64_t least) {
  constexpr int64_t kMost = 1 << 24;
  char* end;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > kMost) {
    fail(name, text, "an integer from " + std::to_string(least) + " to " + std::to_string(kMost));
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    }
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    const auto integer = [&](int64_t least) { return parse_integer(name, value, least); };
    if (name == "--m") {
      o.m.clear();
      for (size_t begin = 0; begin <= value.size();) {
        const size_t comma = std::min(value.find(',', begin), value.size());
        o.m.push_back(parse_integer(name, value.substr(begin, comma - begin), 1));
        begin = comma + 1;
      }
    } else if (name == "--n") {
      o.n = integer(1);
    } else if (name == "--k") {
      o.k = integer(1);
    } else if (name == "--rank") {
      o.rank = integer(0);
    } else if (name == "--loops") {
      o.loops = integer(1);
    } else if (name == "--packed") {
      o.packed = integer(0);
      if (o.packed > 1) fail(name, value, "0 or 1");
    } else if (name == "--threads") {
      o.threads = integer(1);
    } else if (name == "--samples") {
      o.samples = integer(1);
    } else if (name == "--megabytes") {
      o.megabytes = integer(1);
    } else if (name == "--dtype") {
      o.dtype = value;
    } else {
      fail("option", name, "one that --help lists");
    }
  }
  return o;
}

Dtype parse_dtype(const std::string& text) {
  if (text == "fp32") return Dtype::kFloat32;
  if (text == "fp64") return Dtype::kFloat64;
  if (text == "bf16") return Dtype::kBFloat16;
  if (text == "fp16") return Dtype::kFloat16;
  fail("--dtype", text, "fp32, fp64, bf16 or fp16");
}

// `size` numbers of about [1, 2) with random mantissas, aligned as torch aligns.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t size)
      : memory_(static_cast<char*>(::operator new(std::max<int64_t>(1, size * bytes_of(dtype)), kAlign))) {
    advise_huge_pages(memory_.get(), size * bytes_of(dtype));
    for (int64_t i = 0; i < size; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      const uint64_t random = state_ >> 12;  // 52 bits
      if (dtype == Dtype::kFloat64) {
        put(i, uint64_t{0x3ff} << 52 | random);
      } else if (dtype == Dtype::kFloat32) {
        put(i, static_cast<uint32_t>(uint32_t{0x7f} << 23 | random >> 29));
      } else {
        const int bits = dtype == Dtype::kBFloat16 ? 7 : 10;
        put(i, static_cast<uint16_t>((dtype == Dtype::kBFloat16 ? 0x7f : 0xf) << bits | random >> (52 - bits)));
      }
    }
  }
  void* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, kAlign); }
  };
  template <class T>
  void put(int64_t i, T bits) {
    std::memcpy(memory_.get() + i * static_cast<int64_t>(sizeof(T)), &bits, sizeof(T));
  }

  std::unique_ptr<char, Free> memory_;
  static inline uint64_t state_ = 1;
};

// As torch does it: no more threads than grains.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return;
#ifdef _OPENMP
  const int64_t grains = ceil_div(end - begin, grain);
  const int64_t threads = std::min<int64_t>(omp_get_max_threads(), grains);
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int64_t count = omp_get_num_threads(), index = omp_get_thread_num();
      const int64_t from = begin + (end - begin) * index / count, to = begin + (end - begin) * (index + 1) / count;
      if (from < to) body(from, to, context);
    }
    return;
  }
#else
  (void)grain;
#endif
  body(begin, end, context);
}

struct Weights {
  Buffer weight, lora_a, lora_b;
};

int64_t matrix_size(const Options& o, Dtype dtype, int64_t n, int64_t k) {
  return o.packed ? packed_linear::packed_size(dtype, n, k) : n * k;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void measure(const Options& o, Dtype dtype, int64_t m, const std::vector<Weights>& weights) {
  const Buffer x(dtype, m * o.k), y(dtype, m * o.n);
  std::vector<int32_t> loops(m);
  for (int64_t row = 0; row < m; ++row) loops[row] = static_cast<int32_t>(row % o.loops);
  Params params{};
  params.dtype = dtype;
  params.packed = o.packed == 1;
  params.m = m;
  params.n = o.n;
  params.k = o.k;
  params.num_loops = o.loops;
  params.total_rank = params.b_stride = o.rank;
  params.x_row_stride = o.k;
  params.x = x.data();
  params.y = y.data();
  params.segments = {{0, o.n, 0, o.rank}};

  std::vector<double> seconds;
  const int64_t warm_up = static_cast<int64_t>(weights.size());
  for (int64_t i = 0; i < warm_up + o.samples; ++i) {
    const Weights& w = weights[i % weights.size()];
    params.weight = w.weight.data();
    params.lora_a = w.lora_a.data();
    params.lora_b = w.lora_b.data();
    const auto start = std::chrono::steady_clock::now();
    run_cpu(params, group_rows_by_loop(loops.data(), m, o.loops), parallel_for);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (i >= warm_up) seconds.push_back(elapsed.count());
  }
  const int64_t loops_in_batch = std::min(m, o.loops);
  const double elements = static_cast<double>(o.n) * o.k + static_cast<double>(loops_in_batch) * o.rank * (o.n + o.k);
  const double flops = 2.0 * m * (static_cast<double>(o.n) * o.k + static_cast<double>(o.rank) * (o.n + o.k));
  const double typical = median(seconds), least = *std::min_element(seconds.begin(), seconds.end());
  std::printf("%6lld %12.1f %12.1f %8.1f %10.1f\n", static_cast<long long>(m), typical * 1e6, least * 1e6,
              elements * bytes_of(dtype) / typical / 1e9, flops / typical / 1e9);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Options o = parse(argc, argv);
  const Dtype dtype = parse_dtype(o.dtype);
#ifdef _OPENMP
  omp_set_num_threads(static_cast<int>(o.threads));
#else
  if (o.threads > 1) fail("--threads", std::to_string(o.threads), "1: built without OpenMP");
#endif
  const int64_t sizes[] = {matrix_size(o, dtype, o.n, o.k), o.loops * matrix_size(o, dtype, o.rank, o.k),
                           o.loops * matrix_size(o, dtype, o.n, o.rank)};
  const int64_t set_bytes = (sizes[0] + sizes[1] + sizes[2]) * bytes_of(dtype);
  const int64_t num_sets = std::max<int64_t>(1, ceil_div(o.megabytes * 1000000, set_bytes));
  std::vector<Weights> weights;
  for (int64_t i = 0; i < num_sets; ++i) {
    weights.push_back({Buffer(dtype, sizes[0]), Buffer(dtype, sizes[1]), Buffer(dtype, sizes[2])});
  }
  std::printf("n %lld, k %lld, rank %lld, loops %lld, %s, %s, %s, threads %lld, weights of %.1f MB rotated: %lld\n",
              static_cast<long long>(o.n), static_cast<long long>(o.k), static_cast<long long>(o.rank),
              static_cast<long long>(o.loops), o.dtype.c_str(), o.packed ? "packed" : "not packed",
              cpu_isa_name(cpu_isa()), static_cast<long long>(o.threads), static_cast<double>(set_bytes) / 1e6,
              static_cast<long long>(num_sets));
  std::printf("%6s %12s %12s %8s %10s\n", "M", "median us", "least us", "GB/s", "GFLOP/s");
  for (int64_t m : o.m) measure(o, dtype, m, weights);
  return 0;
}
