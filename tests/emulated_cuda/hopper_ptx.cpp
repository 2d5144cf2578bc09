#include "hopper_ptx.h"

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

using emulated::races;

namespace scoat {
namespace hopper {
namespace {

// What a barrier passes on: of the phase that it is in, and of those that are over.
struct Passed {
  int number;
  bool fenced;
  emulated::Access begun;
  emulated::Clock gathered, told;
};
std::map<const Barrier*, Passed> passed;
uint64_t passed_in;  // which of all blocks

// Products of a thread, which are made when it waits for them: who reads the registers before finds what was there.
struct Products {
  bool fenced = false;
  std::deque<std::pair<uint32_t, std::function<void()>>> asked;  // by the group that they are in
};
std::vector<Products> products;
uint64_t products_of;  // which of all blocks

Products& own_products() {
  if (products_of != races.blocks) products.assign(emulated::THREADS, {}), products_of = races.blocks;
  return products[emulated::current];
}

emulated::Clock& known() { return races.clocks[emulated::current]; }

bool is_known(const emulated::Access& past) { return past.moment <= known().seen[size_t(past.agent)]; }

Passed& passed_by(const Barrier* barrier) {
  const auto found = passed.find(barrier);
  if (found == passed.end() || races.blocks != passed_in) emulated::fail("a barrier is used that there is not");
  if (!found->second.fenced || !is_known(found->second.begun))
    emulated::fail("a barrier is used before its threads know of it");
  return found->second;
}

void step(Barrier* barrier) {
  if (barrier->pending < 0) emulated::fail("more arrivals at a barrier than it waits for");
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->pending = barrier->count;
    barrier->phase ^= 1;
    Passed& now = passed_by(barrier);
    now.told.join(now.gathered);
    now.told.seen[size_t(emulated::COPIES + now.number)] = races.copies[size_t(now.number)];
    emulated::progress();
  }
}

// Begins a copy: what reads and writes for it.
auto copier(const Barrier* barrier) {
  const int number = passed_by(barrier).number;
  const uint32_t moment = ++races.copies[size_t(number)];
  return [=](const void* pointer, size_t size, bool writes) {
    races.touch(pointer, size, writes, emulated::COPIES + number, moment, known());
  };
}

// Where a 16-byte piece of a swizzled row of `span` bytes lies: by its address, whatever the matrix begins at.
uint32_t swizzled(uint32_t address, int span) { return address ^ ((address >> 7 & uint32_t(span / 16 - 1)) << 4); }

// A row of 32 bytes of the matrix of a descriptor. One of the threads that need it tells of it.
template <typename T>
void read(uint64_t descriptor, int row, bool tells, float (&to)[32 / sizeof(T)]) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), channels_step = field(16), group_step = field(32);
  const int mode = int(descriptor >> 62), span = mode == 0 ? 16 : mode == 3 ? 32 : mode == 2 ? 64 : 128;
  if (descriptor >> 49 & 7) emulated::fail("a matrix with a base offset");
  for (uint32_t piece = 0; piece < 2; ++piece) {
    uint32_t address = start + uint32_t(row / 8) * group_step + uint32_t(row % 8 * span);
    address += piece * (span == 16 ? channels_step : 16);
    if (address + 16 > emulated::SHARED_BYTES) emulated::fail("a matrix outside of shared memory");
    if (span > 16) address = swizzled(address, span);
    const unsigned self = emulated::current;
    if (tells)
      races.touch(emulated::shared + address, 16, false, emulated::PRODUCTS + int(self / 32), races.products[self] + 1,
                  known());
    constexpr size_t COUNT = 16 / sizeof(T);
    T values[COUNT];
    std::memcpy(values, emulated::shared + address, 16);
    for (size_t k = 0; k < COUNT; ++k) to[piece * COUNT + k] = to_float(values[k]);
  }
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - emulated::shared;
  if (offset < 0 || offset >= emulated::SHARED_BYTES) emulated::fail("an address outside of shared memory");
  return uint32_t(offset);
}

void init(Barrier* barrier, int count) {
  const unsigned self = emulated::current;
  if (races.blocks != passed_in) passed.clear(), passed_in = races.blocks;
  const int number = int(passed.size());
  if (number == emulated::BARRIERS) emulated::fail("more barriers than the clocks have");
  if (passed.count(barrier)) emulated::fail("a barrier is initialised twice");
  races.touch(barrier, sizeof(Barrier), true, int(self), known().seen[self], known());
  races.reserve(barrier, sizeof(Barrier));
  *barrier = {count, count, 0, 0};
  passed[barrier] = {number, false, {int(blockIdx.x), int(self), known().seen[self]}, {}, {}};
}

void fence_init() {
  for (auto& [barrier, found] : passed) found.fenced = found.fenced || is_known(found.begun);
}

void arrive_expect(Barrier* barrier, int bytes) {
  passed_by(barrier).gathered.join(known());
  races.tick(emulated::current);
  barrier->bytes += bytes;
  --barrier->pending;
  step(barrier);
}

void wait(Barrier* barrier, int parity) {
  const Passed& by = passed_by(barrier);
  while (barrier->phase == parity) emulated::give_way();
  known().join(by.told);
}

void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  if (bytes % 16 || shared_address(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulated::fail("a copy that is not of whole 16 bytes");
  const auto touch = copier(barrier);
  touch(to, size_t(bytes), true);
  touch(from, size_t(bytes), false);
  std::memcpy(to, from, size_t(bytes));
  barrier->bytes -= bytes;
  step(barrier);
}

void copy_box(void* to, const CUtensorMap* map, Barrier* barrier, int c, int x, int y, int n) {
  const uint32_t start = shared_address(to), bytes = uint32_t(map->box[0] * map->box[1] * map->box[2] * map->size);
  if (start % 128 || start % uint32_t(8 * map->span)) emulated::fail("a box that does not begin a swizzle pattern");
  const auto touch = copier(barrier);
  touch(to, bytes, true);
  uint32_t offset = start;
  for (int j = 0; j < map->box[2]; ++j)
    for (int i = 0; i < map->box[1]; ++i)
      for (int k = 0; k < map->box[0]; ++k, offset += uint32_t(map->size)) {
        const int64_t at[] = {c + k, x + i, y + j, n};
        const uint8_t* from = map->data;
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) {
          inside = inside && at[axis] >= 0 && at[axis] < map->sizes[axis];
          from += at[axis] * map->steps[axis];
        }
        uint8_t* const value = emulated::shared + swizzled(offset, map->span);
        if (inside) {
          touch(from, size_t(map->size), false);
          std::memcpy(value, from, size_t(map->size));
        } else {
          std::memset(value, 0, size_t(map->size));
        }
      }
  barrier->bytes -= int(bytes);
  step(barrier);
}

void fence_async() { races.fence(emulated::current); }

void products_begin() {
  emulated::meet(int(emulated::current / 32), 32, emulated::Meets::converges);
  own_products().fenced = true;
}

void products_commit() {
  ++races.products[emulated::current];
  own_products().fenced = false;
}

void products_wait(int left) {
  const unsigned self = emulated::current;
  emulated::meet(int(self / 32), 32, emulated::Meets::converges);
  const auto done = uint32_t(std::max(int(races.products[self]) - left, 0));
  uint32_t& seen = known().seen[emulated::PRODUCTS + self / 32];
  seen = std::max(seen, done);
  auto& asked = own_products().asked;
  for (; !asked.empty() && asked.front().first <= done; asked.pop_front()) asked.front().second();
}

// To the nearest, ties to even, and 448 for what is larger.
uint8_t e4m3_of(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const float size = std::min(std::fabs(value), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  const int eighths = int(std::nearbyint(std::ldexp(size, 3 - exponent)));  // of 2^exponent; fewer than 8 if subnormal
  return sign | uint8_t((exponent + 6) * 8 + eighths);
}

float to_float(E4M3 value) {
  static const auto all = [] {
    std::array<float, 256> found{};
    for (int bits = 0; bits < 256; ++bits) {
      const int exponent = bits >> 3 & 15, eighths = bits & 7;
      const float size = std::ldexp(float(exponent ? 8 + eighths : eighths), (exponent ? exponent : 1) - 10);
      found[size_t(bits)] = std::copysign((bits & 0x7f) == 0x7f ? NAN : size, bits & 0x80 ? -1.0f : 1.0f);
    }
    return found;
  }();
  return all[value.bits];
}

template <typename T>
void multiply(int n, float* d, uint64_t a, uint64_t b) {
  const int lane = int(threadIdx.x % 32), first = 16 * int(threadIdx.x / 32 % 4) + lane / 4;
  constexpr int K = 32 / sizeof(T);
  if (!own_products().fenced) emulated::fail("products without a fence before them");
  float rows[2][K], column[K];
  read<T>(a, first, lane % 4 == 0, rows[0]);
  read<T>(a, first + 8, lane % 4 == 0, rows[1]);
  std::vector<float> totals(size_t(n / 2));
  for (int j = 0; j < n / 8; ++j)
    for (int i = 0; i < 2; ++i) {
      read<T>(b, 8 * j + lane % 4 * 2 + i, lane < 4, column);
      for (int half = 0; half < 2; ++half)
        for (int k = 0; k < K; ++k) totals[size_t(4 * j + 2 * half + i)] += rows[half][k] * column[k];
    }
  own_products().asked.emplace_back(races.products[emulated::current] + 1, [d, totals = std::move(totals)] {
    for (size_t i = 0; i < totals.size(); ++i) d[i] += totals[i];
  });
}

template void multiply<BFloat>(int, float*, uint64_t, uint64_t);
template void multiply<Half>(int, float*, uint64_t, uint64_t);
template void multiply<E4M3>(int, float*, uint64_t, uint64_t);

}  // namespace hopper
}  // namespace scoat
