#include "races.h"

#include <algorithm>
#include <cstring>

#include "cuda_runtime.h"

// Where this library lies, and in it the variables without a value to begin with, of which those of kernels are a
// block's.
extern "C" __attribute__((visibility("hidden"))) uint8_t __ehdr_start[], __bss_start[], _end[];

namespace emulated {
namespace {

std::string name(const Access& access) {
  const auto numbered = [&](const char* what, int first) { return what + std::to_string(access.agent - first); };
  return (access.agent >= PRODUCTS ? numbered("products of warp ", PRODUCTS)
          : access.agent >= COPIES ? numbered("copies for barrier ", COPIES)
                                   : numbered("thread ", 0)) +
         " of block " + std::to_string(access.block);
}

}  // namespace

void Clock::join(const Clock& other) {
  for (int i = 0; i < AGENTS; ++i) seen[i] = std::max(seen[i], other.seen[i]);
  for (int i = 0; i < AGENTS; ++i) fenced[i] = std::max(fenced[i], other.fenced[i]);
}

void Races::allow(const void* pointer, size_t size) {
  if (!pointer) return allowed.clear();
  auto begin = reinterpret_cast<uintptr_t>(pointer), end = begin + size;
  auto other = allowed.upper_bound(begin);  // grows by those that it overlaps
  if (other != allowed.begin() && std::prev(other)->second >= begin) --other;
  for (; other != allowed.end() && other->first <= end; other = allowed.erase(other))
    begin = std::min(begin, other->first), end = std::max(end, other->second);
  allowed[begin] = end;
}

void Races::begin_launch(size_t bytes) {
  if (bytes > SHARED_BYTES) fail("more shared memory than there is");
  shared_bytes = bytes;
  others.clear();
  words.resize(SHARED_BYTES / 4);
}

void Races::begin_block(int number, unsigned threads) {
  if (threads > THREADS) fail("more threads than the clocks have");
  block = number, ++blocks;
  clocks.assign(threads, {});
  for (unsigned i = 0; i < threads; ++i) clocks[i].seen[i] = 1;
  products.assign(threads, 0);
  copies.fill(0);
  for (size_t i = first_word; i < last_word; ++i) words[i] = {};
  reserved.assign(words.size(), false);
  first_word = words.size(), last_word = 0;
  variables.clear();
}

void Races::reserve(const void* barrier, size_t size) {
  const auto first = size_t(static_cast<const uint8_t*>(barrier) - shared) / 4;
  std::fill_n(reserved.begin() + std::ptrdiff_t(first), size / 4, true);
}

void Races::fence(unsigned thread) {
  clocks[thread].fenced = clocks[thread].seen;
  tick(thread);
}

void Races::check(const char* now, const Access& past, const char* then, const Access& self, const Clock& known,
                  const char* where, size_t offset) const {
  if (past.moment == 0) return;
  const bool before = past.block == self.block && past.moment <= known.seen[past.agent];
  // the fence is of shared memory alone
  const bool fenced = std::strncmp(where, "shared", 6) == 0 && past.moment <= known.fenced[past.agent];
  const bool visible = self.agent < COPIES || past.agent >= COPIES || fenced;
  if (before && visible) return;
  fail(name(self) + " " + now + " " + where + " " + std::to_string(offset) + ", which " + name(past) + " " + then +
       (before ? " without a fence between proxies" : " at the same time"));
}

void Races::touch(Cell& cell, bool writes, const Access& self, const Clock& known, const char* where, size_t offset) {
  const char* const now = writes ? "writes" : "reads";
  check(now, cell.written, "wrote", self, known, where, offset);
  auto& more = cell.more;
  const auto is_own = [&](const Access& past) { return past.agent == self.agent && past.block == self.block; };
  if (writes) {
    check(now, cell.first, "read", self, known, where, offset);
    for (const Access& past : more) check(now, past, "read", self, known, where, offset);
    cell.written = self, cell.first = {}, more.clear();
  } else if (cell.first.moment == 0 || is_own(cell.first)) {
    cell.first = self;
  } else {
    if (!more.empty() && more.back().block != self.block) more.clear();  // of other blocks the first stands for all
    const auto own = std::find_if(more.begin(), more.end(), is_own);
    if (own == more.end())
      more.push_back(self);
    else
      *own = self;
  }
}

void Races::touch(const void* pointer, size_t size, bool writes, int agent, uint32_t moment, const Clock& known) {
  const Access self{block, agent, moment};
  const auto* const first = static_cast<const uint8_t*>(pointer);
  if (first >= shared && first < shared + SHARED_BYTES) {
    const auto offset = size_t(first - shared);
    if (offset % 4 || size % 4) fail("less than 4 bytes of shared memory at once");
    if (offset + size > shared_bytes) fail(name(self) + " uses shared memory that it was not given");
    first_word = std::min(first_word, offset / 4), last_word = std::max(last_word, (offset + size) / 4);
    for (size_t i = offset; i < offset + size; i += 4) {
      if (reserved[i / 4]) fail(name(self) + " uses shared memory at " + std::to_string(i) + ", where a barrier lies");
      if (!writes && words[i / 4].written.moment == 0)
        fail(name(self) + " reads shared memory at " + std::to_string(i) + ", which nobody wrote");
      touch(words[i / 4], writes, self, known, "shared memory at", i);
    }
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(first);
  if (first < __ehdr_start || first >= _end) {
    const auto after = allowed.upper_bound(address);
    if (after == allowed.begin() || std::prev(after)->second < address + size)
      fail(name(self) + (writes ? " writes" : " reads") + " memory that it was not given");
  }
  auto& bytes = first >= __bss_start && first < _end ? variables : others;
  for (uintptr_t i = address; i < address + size;) {
    auto& some = bytes[i / 64];
    do touch(some[i % 64], writes, self, known, "memory at", i);
    while (++i % 64 && i < address + size);
  }
}

}  // namespace emulated

extern "C" void allow(const void* pointer, size_t size) { emulated::races.allow(pointer, size); }
