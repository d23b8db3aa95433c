#include "device/primitives.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>

namespace rrt::emulation {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kStackBytes = 64 << 10;

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void violate(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Violation(text.str());
}

// The last accesses to one byte of shared memory. Those of two threads are ordered if a barrier of the block, or of
// the warp that both are in, lies between them. Epochs count barriers.
struct Access {
  static constexpr int kNobody = -1, kSeveral = -2;
  int thread = kNobody;  // kSeveral: of `warp`, or of several warps if that is kSeveral too
  int warp = kNobody;
  int64_t epoch = -1, warp_epoch = -1;
};

struct ByteHistory {
  static constexpr int kNobody = -1;
  Access write, read;
  int arriving = kNobody;  // the thread whose copy_async to it has not been waited for
};

struct Copy {
  char* shared;
  char bytes[16];
  int64_t size;
};

struct Thread {
  ucontext_t context;  // of its first entry
  jmp_buf place;       // where it goes on
  bool entered = false;
  bool done = false;
  bool dependency_met = false;
  const int64_t* awaited = nullptr;  // not to be resumed before this counter differs from `seen`
  int64_t seen = 0;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  int64_t phase = 0;
  int64_t epoch = 0;  // barriers of the warp
  const void* rows[kLanes];
  uint32_t words[kLanes][4];
  uint32_t a[kLanes][4], b[kLanes][2];
  float d[kLanes][4];
  double shuffled[kLanes][2];
};

struct Machine {
  const Launch* launch;
  const std::function<void()>* body;
  std::vector<Region> regions;
  std::vector<char> shared;
  std::vector<ByteHistory> history;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int64_t epoch = 0;
  int at_barrier = 0;
  device::Index block{};
  int current = -1;
  jmp_buf scheduler;
  std::string violation;
  bool dependency_met = false;  // by any thread
  bool early_dependents = false;
  int64_t progress = 0;

  Thread& thread() { return threads[current]; }

  // Back to the scheduler, to be resumed later.
  void yield() {
    if (_setjmp(thread().place) == 0) _longjmp(scheduler, 1);
  }

  // Until the running thread yields. Only its first entry takes a context: each switch by contexts asks the system for the
  // signal mask, which would be a third of the time.
  void resume() {
    if (_setjmp(scheduler) != 0) return;
    if (thread().entered) _longjmp(thread().place, 1);
    thread().entered = true;
    setcontext(&thread().context);
  }

  // Until the counter, which other threads advance, differs from `seen`.
  void await(const int64_t& counter, int64_t seen) {
    thread().awaited = &counter;
    thread().seen = seen;
    if (counter == seen) yield();
    thread().awaited = nullptr;
  }

  void complete(Copy& copy) {
    std::memcpy(copy.shared, copy.bytes, copy.size);
    const int64_t offset = copy.shared - shared.data();
    for (int64_t i = offset; i < offset + copy.size; ++i) {
      history[i].arriving = ByteHistory::kNobody;
      history[i].write = access();
    }
  }

  Access access() const { return {current, current / kLanes, epoch, warps[current / kLanes].epoch}; }

  // Whether an access of another thread may be at the same time as one of the running thread.
  bool unordered(const Access& other) const {
    const Access now = access();
    if (other.epoch != now.epoch || other.thread == now.thread) return false;
    return other.warp != now.warp || other.warp_epoch == now.warp_epoch;
  }
};

Machine* machine = nullptr;

void enter() {
  try {
    (*machine->body)();
  } catch (const Violation& violation) {
    std::ostringstream text;
    text << "block (" << machine->block.x << ", " << machine->block.y << ", " << machine->block.z << ") thread "
         << machine->current << ": " << violation.what();
    if (machine->violation.empty()) machine->violation = text.str();
  }
  machine->thread().done = true;
  machine->progress++;
  machine->yield();
}

// Kept from block to block: new ones would cost more than what most blocks do.
char* stack_of(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

void run_block(std::mt19937_64& random) {
  Machine& m = *machine;
  const int threads = m.launch->threads;
  std::fill(m.shared.begin(), m.shared.end(), static_cast<char>(0xff));  // NaN, as any dtype
  m.history.assign(m.shared.size(), {});
  m.threads.clear();
  m.threads.resize(threads);
  m.warps.assign((threads + kLanes - 1) / kLanes, {});
  m.epoch = 0;
  m.at_barrier = 0;
  for (int i = 0; i < threads; ++i) {
    ucontext_t& context = m.threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_of(i);
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  while (m.violation.empty()) {
    std::shuffle(order.begin(), order.end(), random);
    const int64_t before = m.progress;
    bool all_done = true;
    for (int index : order) {
      const Thread& thread = m.threads[index];
      if (thread.done) continue;
      all_done = false;
      if (thread.awaited != nullptr && *thread.awaited == thread.seen) continue;
      m.current = index;
      m.resume();
      if (!m.violation.empty()) return;
    }
    if (all_done) {
      for (const Thread& thread : m.threads) {
        if (!thread.open_group.empty() || !thread.groups.empty()) m.violation = "asynchronous copies outlive their thread";
      }
      return;
    }
    if (m.progress == before) {
      m.violation = "deadlock: a barrier or a warp-wide operation waits for threads that do not come";
      return;
    }
  }
}

void bounds_of_shared(const void* address, int64_t size) {
  const Machine& m = *machine;
  const char* at = static_cast<const char*>(address);
  if (at < m.shared.data() || at + size > m.shared.data() + m.shared.size()) {
    violate("shared memory of ", m.shared.size(), " bytes is touched at byte ", at - m.shared.data());
  }
  if (reinterpret_cast<uintptr_t>(at) % size != 0) violate("shared memory is touched at an address not aligned to ", size);
}

}  // namespace

const Region& Report::region(const std::string& name) const {
  for (const Region& region : regions) {
    if (region.name == name) return region;
  }
  throw std::invalid_argument("no region '" + name + "'");
}

Report run(const Launch& launch, const std::function<void()>& body) {
  Machine m;
  m.launch = &launch;
  m.body = &body;
  m.regions = launch.regions;
  // vector<char> of this size is aligned to 16 by the allocator.
  m.shared.resize(launch.shared_bytes);
  machine = &m;
  std::mt19937_64 random(launch.seed);
  for (int z = 0; z < launch.grid.z && m.violation.empty(); ++z) {
    for (int y = 0; y < launch.grid.y && m.violation.empty(); ++y) {
      for (int x = 0; x < launch.grid.x && m.violation.empty(); ++x) {
        m.block = {x, y, z};
        run_block(random);
      }
    }
  }
  machine = nullptr;
  for (const Region& region : m.regions) {
    if (!region.dependent || m.dependency_met || !m.violation.empty()) continue;
    m.violation = "no thread reaches dependency_wait: the next kernel may come before the one that wrote '" + region.name + "'";
  }
  return {m.violation, m.regions, m.early_dependents};
}

int thread_index() { return machine->current; }
device::Index block_index() { return machine->block; }
char* shared_memory() { return machine->shared.data(); }

void touch_shared(const void* address, int64_t size, bool write) {
  Machine& m = *machine;
  bounds_of_shared(address, size);
  const int64_t offset = static_cast<const char*>(address) - m.shared.data();
  for (int64_t i = offset; i < offset + size; ++i) {
    ByteHistory& byte = m.history[i];
    if (byte.arriving != ByteHistory::kNobody) {
      violate("shared byte ", i, " is touched before the copy of thread ", byte.arriving, " to it has been waited for");
    }
    if (m.unordered(byte.write)) {
      violate("race: shared byte ", i, " was written by thread ", byte.write.thread, " since the last barrier");
    }
    if (write && m.unordered(byte.read)) {
      violate("race: shared byte ", i, " is written, and another thread read it since the last barrier");
    }
    const Access now = m.access();
    if (write) {
      byte.write = now;
    } else if (byte.read.epoch != now.epoch || byte.read.thread == now.thread) {
      byte.read = now;
    } else {
      byte.read.thread = Access::kSeveral;
      if (byte.read.warp != now.warp) byte.read.warp = Access::kSeveral;
      byte.read.warp_epoch = now.warp_epoch;
    }
  }
}

// Whether the running thread writes while the kernel before, which wrote a region here, may still use what it writes.
static bool writes_early() {
  const Machine& m = *machine;
  return !m.threads[m.current].dependency_met &&
         std::any_of(m.regions.begin(), m.regions.end(), [](const Region& region) { return region.dependent; });
}

void touch_global(const void* address, int64_t size, bool write) {
  const char* at = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(at) % size != 0) violate("global memory is touched at an address not aligned to ", size);
  for (Region& region : machine->regions) {
    if (at < region.begin || at + size > region.begin + region.size) continue;
    if (!write && region.dependent && !machine->thread().dependency_met) {
      violate("region '", region.name, "' is read before dependency_wait");
    }
    if (write && writes_early()) violate("region '", region.name, "' is written before dependency_wait");
    if (write && !region.writable) violate("region '", region.name, "' is written at byte ", at - region.begin);
    (write ? region.bytes_written : region.bytes_read) += size;
    return;
  }
  violate("global memory outside all regions is ", write ? "written" : "read");
}

// The region of [address, address + size); a violation if there is none.
Region& region_of(const void* address, int64_t size) {
  const char* at = static_cast<const char*>(address);
  for (Region& region : machine->regions) {
    if (region.begin <= at && at + size <= region.begin + region.size) return region;
  }
  violate("a hint leads outside of all regions");
}

int32_t load_hint(const int32_t* address) {
  region_of(address, sizeof(*address));
  if (machine->launch->honest_hints) return *address;
  static uint32_t state = 0;
  state = state * 1664525 + 1013904223;
  switch (state >> 30) {
    case 0: return *address;
    case 1: return *address + 1;
    case 2: return static_cast<int32_t>(state >> 16 & 63);
    default: return static_cast<int32_t>(state * 2654435761u);
  }
}

void prefetch(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || bytes % 16 != 0) violate("a prefetch is not of whole vectors");
  Region& region = region_of(address, bytes);
  const int64_t begin = static_cast<const char*>(address) - region.begin;
  region.prefetched.emplace_back(begin, begin + bytes);
}

void copy_async(void* shared, const void* global, int64_t size, bool valid) {
  Machine& m = *machine;
  bounds_of_shared(shared, size);
  touch_shared(shared, size, true);
  Copy copy{static_cast<char*>(shared), {}, size};
  if (valid) {
    touch_global(global, size, false);
    std::memcpy(copy.bytes, global, size);
  }
  const int64_t offset = copy.shared - m.shared.data();
  for (int64_t i = offset; i < offset + size; ++i) m.history[i].arriving = m.current;
  m.thread().open_group.push_back(copy);
}

void copy_commit() {
  Thread& thread = machine->thread();
  thread.groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}

void copy_wait(int groups) {
  if (machine->launch->sabotage == Sabotage::kSkipCopyWait && groups > 0) return;
  Thread& thread = machine->thread();
  while (static_cast<int>(thread.groups.size()) > groups) {
    for (Copy& copy : thread.groups.front()) machine->complete(copy);
    thread.groups.erase(thread.groups.begin());
  }
}

void block_barrier() {
  Machine& m = *machine;
  if (m.launch->sabotage == Sabotage::kSkipBarrier) return;
  const int64_t phase = m.epoch;
  m.progress++;
  if (++m.at_barrier == m.launch->threads) {
    m.at_barrier = 0;
    m.epoch++;
  }
  m.await(m.epoch, phase);
}

void warp_barrier() {
  Machine& m = *machine;
  if (m.launch->sabotage == Sabotage::kSkipWarpBarrier) return;
  Warp& warp = m.warps[m.current / kLanes];
  const int64_t phase = warp.phase;
  m.progress++;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    warp.phase++;
    warp.epoch++;
  }
  m.await(warp.phase, phase);
}

void load_matrices(uint32_t (&to)[4], const void* shared_row, bool transposed) {
  Machine& m = *machine;
  const int lane = m.current % kLanes;
  Warp& warp = m.warps[m.current / kLanes];
  touch_shared(shared_row, 16, false);
  warp.rows[lane] = shared_row;
  const int64_t phase = warp.phase;
  m.progress++;
  if (++warp.arrived == kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const bool wrong = m.launch->sabotage == Sabotage::kWrongRows;
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row = (transposed ? l % 4 * 2 + i : l / 4) ^ (wrong ? 1 : 0);
          const int column = transposed ? l / 4 : l % 4 * 2 + i;
          std::memcpy(&pair[i], static_cast<const char*>(warp.rows[8 * matrix + row]) + column * 2, 2);
        }
        warp.words[l][matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
    warp.arrived = 0;
    warp.phase++;
  }
  m.await(warp.phase, phase);
  std::memcpy(to, warp.words[lane], sizeof(to));
}

double shuffle_from(double value, int source) {
  Machine& m = *machine;
  const int lane = m.current % kLanes;
  Warp& warp = m.warps[m.current / kLanes];
  const int64_t phase = warp.phase;
  m.progress++;
  // A slot per parity: the fastest lane may be one operation ahead of the slowest's reading.
  warp.shuffled[lane][phase % 2] = value;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    warp.phase++;
  }
  m.await(warp.phase, phase);
  return warp.shuffled[source][phase % 2];
}

void launch_dependents() { machine->early_dependents |= !machine->thread().dependency_met; }
void dependency_wait() {
  if (machine->launch->sabotage == Sabotage::kSkipDependencyWait) return;
  machine->thread().dependency_met = machine->dependency_met = true;
}

// m16n8k16: lane = 4 g + t. a: rows g and g + 8, columns 2t, 2t + 1 and those + 8; b: column g, rows likewise;
// d: rows g and g + 8, columns 2t and 2t + 1.
void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(uint16_t)) {
  Machine& m = *machine;
  const int lane = m.current % kLanes;
  Warp& warp = m.warps[m.current / kLanes];
  std::memcpy(warp.a[lane], a, sizeof(a));
  std::memcpy(warp.b[lane], b, sizeof(b));
  std::memcpy(warp.d[lane], d, sizeof(d));
  const int64_t phase = warp.phase;
  m.progress++;
  if (++warp.arrived == kLanes) {
    float full_a[16][16], full_b[16][8];
    const auto half = [&](uint32_t word, int index) { return widen(static_cast<uint16_t>(word >> (16 * index))); };
    for (int l = 0; l < kLanes; ++l) {
      const bool wrong = m.launch->sabotage == Sabotage::kWrongLaneMap;
      const int g = wrong ? l % 8 : l / 4, t = wrong ? l / 8 : l % 4;
      for (int i = 0; i < 2; ++i) {
        full_a[g][2 * t + i] = half(warp.a[l][0], i);
        full_a[g + 8][2 * t + i] = half(warp.a[l][1], i);
        full_a[g][2 * t + 8 + i] = half(warp.a[l][2], i);
        full_a[g + 8][2 * t + 8 + i] = half(warp.a[l][3], i);
        full_b[2 * t + i][g] = half(warp.b[l][0], i);
        full_b[2 * t + 8 + i][g] = half(warp.b[l][1], i);
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = warp.d[l][i];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(full_a[row][k]) * full_b[k][column];
        warp.d[l][i] = static_cast<float>(sum);
      }
    }
    warp.arrived = 0;
    warp.phase++;
  }
  m.await(warp.phase, phase);
  std::memcpy(d, warp.d[lane], sizeof(d));
}

float widen_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

uint16_t narrow_bfloat16(float value) {
  if (value != value) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widen_float16(uint16_t value) {
  const int exponent = value >> 10 & 31, fraction = value & 1023;
  const float sign = value & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

uint16_t narrow_float16(float value) {
  if (value != value) return 0x7e00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent = magnitude == 0 ? -14 : std::max(-14, std::ilogb(magnitude));
  // nearbyint rounds to even; a carry into the exponent comes out right by itself.
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (fraction + ((exponent + 14) << 10)));
}

}  // namespace rrt::emulation
