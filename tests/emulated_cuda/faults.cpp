// A kernel that does all that races.h watches, and leaves out what it is told to.
#include <hopper_ptx.h>

#include <string>
#include <vector>

namespace {

using namespace scoat::hopper;

constexpr int THREADS = 128 + 32;  // that multiply, and that fetch and store
constexpr int ROUNDS = 3, BYTES = 64 * 32;

struct Parameters {
  const uint8_t* from;
  float* out;
  bool (*without)(const char* what);
};

// 64 pixels of 16 channels, copied, are multiplied with 16 x 16 weights, stored by a warp, round after round.
void kernel(Parameters p) {
  SCOAT_DYNAMIC_SHARED(memory);
  auto* const barriers = reinterpret_cast<Barrier*>(memory + 8192);
  auto* const weights = reinterpret_cast<uint32_t*>(memory + BYTES);
  auto* const totals = reinterpret_cast<float*>(memory + 4096);
  Barrier *const full = barriers, *const empty = barriers + 1;
  const int thread = int(threadIdx.x), lane = thread % 32;
  if (thread == 0) {
    init(full, 2), init(empty, 4);
    if (!p.without("the fence of barriers")) fence_init();
  }
  if (thread < 128) totals[thread] = 0;
  __syncthreads();
  if (thread >= 128) {
    for (int round = 0; round < ROUNDS; ++round) {
      if (!p.without("a wait for an empty stage")) wait(empty, 1 - round % 2);
      if (lane == 0) {
        arrive_expect(full, BYTES);
        copy_bytes(memory, p.from, BYTES, full);
      }
      for (int i = lane; i < 128 && !p.without("a value"); i += 32) weights[i] = 0;
      if (!p.without("a fence between proxies")) fence_async();
      if (!p.without("a warp's barrier")) __syncwarp();
      if (lane == 0) arrive(full);
    }
    return;
  }
  float values[8] = {};
  for (int round = 0; round < ROUNDS; ++round) {
    if (!p.without("a wait for a full stage")) wait(full, round % 2);
    if (!p.without("a fence before products")) products_begin();
    multiply<scoat::BFloat, 16>(values, uint64_t(128 / 16) << 32 | uint64_t(1024 / 16) << 16,
                                uint64_t(BYTES / 16) | uint64_t(128 / 16) << 32 | uint64_t(256 / 16) << 16);
    products_commit();
    if (!p.without("a wait for products")) products_wait<0>();
    if (lane == 0) arrive(empty);
  }
  totals[thread] = values[0];
  if (!p.without("a barrier of all")) synchronise(1, 128);
  if (p.without("somebody at a barrier") && lane == 0) return;
  const float other = __shfl_xor_sync(0xffffffffu, values[1], 1);
  const unsigned block = p.without("a place for each block") ? 0 : blockIdx.x;
  if (p.without("a barrier's place") && thread == 0) weights[(8192 - BYTES) / 4] = 0;
  if (p.without("the end") && thread == 127) p.out[256] = 0;
  const uint4 vector = *reinterpret_cast<const uint4*>(p.from + (p.without("a vector's beginning") ? 8 : 0));
  p.out[128 * block + thread] = totals[127 - thread] + other + float(vector.x);
}

std::string missing;

}  // namespace

void run_without(const std::string& what, int blocks) {
  missing = what;
  const std::vector<uint8_t> from(BYTES + 16);
  std::vector<float> out(256);
  const auto aligned = (reinterpret_cast<uintptr_t>(from.data()) + 15) / 16 * 16;
  emulated::races.allow(nullptr, 0);
  emulated::races.allow(from.data(), from.size());
  emulated::races.allow(out.data(), sizeof(float) * out.size());
  launch(kernel, blocks, THREADS, what == "the last bytes" ? 8192 : 8192 + 32, nullptr,
         Parameters{reinterpret_cast<const uint8_t*>(aligned), out.data(),
                    [](const char* what) { return missing == what; }});
}
