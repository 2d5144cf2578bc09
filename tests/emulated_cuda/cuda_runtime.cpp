// Compiled without the calls that sources under test make before each access, which are defined here.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <utility>

#include "races.h"

namespace emulated {
namespace {

constexpr size_t STACK = 64 << 10;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index{0};
  bool done = false;
};

// Some threads that wait for each other, and what they tell each other.
struct Meeting {
  unsigned arrived = 0, number = 0, size = 0;
  bool converges = false;
  Clock gathered, told;
};

std::vector<Thread> threads;
ucontext_t scheduler;
bool running, progressed;
const char* host;  // where the host's stack is
std::map<int, Meeting> meetings;
std::vector<uint32_t> slots[2];
const void* kernel;
void (*call)(const void* kernel);
std::string failure;

void entry() {
  call(kernel);
  threads[current].done = true;
}

// Before an access by a source under test.
void accessed(const void* pointer, size_t size, bool writes) {
  if (!running) return;  // on the host
  const auto lies_in = [&](const char* stack) {
    const auto offset = static_cast<const char*>(pointer) - stack;
    return offset >= 0 && offset < int64_t(STACK);
  };
  if (lies_in(threads[current].stack.data()) || lies_in(host)) return;  // a thread's own, or a parameter
  const Clock& known = races.clocks[current];
  races.touch(pointer, size, writes, int(current), known.seen[current], known);
}

}  // namespace

void fail(const std::string& what) {
  failure = "emulated CUDA: " + what;
  if (!running) throw std::runtime_error(failure);
  give_way();
  std::abort();  // nobody comes back
}

void progress() { progressed = true; }

void give_way() { swapcontext(&threads[current].context, &scheduler); }

void meet(int name, unsigned size, Meets how) {
  Meeting& meeting = meetings[name];
  const unsigned number = meeting.number;
  const bool converges = how == Meets::converges;
  if (meeting.arrived == 0) meeting.size = size, meeting.converges = converges;
  if (meeting.size != size || meeting.converges != converges) fail("threads meet for different reasons");
  if (!converges) {
    meeting.gathered.join(races.clocks[current]);
    races.tick(current);
  }
  if (++meeting.arrived == size) {
    meeting.arrived = 0, ++meeting.number;
    if (!converges) meeting.told = std::exchange(meeting.gathered, {});
    progress();
  }
  if (how == Meets::announces) return;
  while (meeting.number == number) give_way();
  if (how == Meets::waits) races.clocks[current].join(meeting.told);
}

uint32_t shuffled(unsigned mask, uint32_t value, unsigned other) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  const int warp = int(current / 32);
  auto& given = slots[meetings[warp].number % 2];
  given[current] = value;
  meet(warp, 32, Meets::converges);
  return given[current / 32 * 32 + other];
}

void run(unsigned blocks, dim3 block, size_t shared_bytes, const void* kernel_, void (*call_)(const void* kernel)) {
  const unsigned size = block.x * block.y * block.z;
  std::minstd_rand dice(size);
  kernel = kernel_, call = call_;
  host = static_cast<const char*>(__builtin_frame_address(0));
  blockDim = block;
  threads.resize(size);
  for (auto& slot : slots) slot.assign(size, 0);
  races.begin_launch(shared_bytes);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = dim3(b);
    meetings.clear(), failure.clear();
    races.begin_block(int(b), size);
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = threads[i];
      thread.stack.resize(STACK);
      thread.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = STACK;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, entry, 0);
    }
    bool all = false;  // in a round every other warp is slow, unless the rest can only wait for it
    for (unsigned left = size; left > 0;) {
      progressed = false;
      for (unsigned start = 0; start < size; start += 32) {
        if (!all && dice() / 7 % 2) continue;
        for (current = start; current < min(start + 32, size); ++current) {
          if (threads[current].done) continue;
          threadIdx = threads[current].index;
          running = true;
          swapcontext(&scheduler, &threads[current].context);
          running = false;
          if (!failure.empty()) throw std::runtime_error(failure);
          if (threads[current].done) --left, progress();
        }
      }
      if (all && !progressed) fail("all threads wait: for a shuffle or barrier that not all of them reach");
      all = !progressed;
    }
  }
}

}  // namespace emulated

#define SCOAT_CALLED(name, size, writes) \
  void __tsan_##name(void* pointer) { emulated::accessed(pointer, size, writes); }
#define SCOAT_CALLED_FOR(size)                    \
  SCOAT_CALLED(read##size, size, false)           \
  SCOAT_CALLED(write##size, size, true)           \
  SCOAT_CALLED(unaligned_read##size, size, false) \
  SCOAT_CALLED(unaligned_write##size, size, true)
extern "C" {
SCOAT_CALLED_FOR(1)
SCOAT_CALLED_FOR(2)
SCOAT_CALLED_FOR(4)
SCOAT_CALLED_FOR(8)
SCOAT_CALLED_FOR(16)
void __tsan_read_range(void* pointer, size_t size) { emulated::accessed(pointer, size, false); }
void __tsan_write_range(void* pointer, size_t size) { emulated::accessed(pointer, size, true); }
// What the compiler calls where a pointer has not the alignment of its type: this fails on a GPU.
void __ubsan_handle_type_mismatch_v1(void*, void*) { emulated::fail("a vector that does not begin at its size"); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
