// Who may see what: finds accesses to the same memory that nothing orders, of which one writes, whichever order they
// happen to run in here. The compiler calls __tsan_... before each access of a source (-fsanitize=thread, without its
// library), and whoever synchronises says so. Clocks are vectors, as in FastTrack (Flanagan and Freund, PLDI 2009): an
// agent knows how much of every other agent's past lies in its own.
//
// Also found: accesses outside of the memory that a kernel was given, or to a barrier's own, and to shared memory that
// nobody wrote (of variables in shared memory that is not known).
//
// Agents are the threads of a block, what copies for a barrier, and the products of each warp. The last two work
// through the asynchronous proxy: they see what a thread stored, and may overwrite what it loaded, only where a fence
// between proxies lies between, too.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulated {

constexpr int THREADS = 512, BARRIERS = 32, WARPS = THREADS / 32;
constexpr int COPIES = THREADS, PRODUCTS = COPIES + BARRIERS, AGENTS = PRODUCTS + WARPS;  // the first of each kind
constexpr int SHARED_BYTES = 227 << 10;
alignas(1024) inline uint8_t shared[SHARED_BYTES];

// How much an agent knows of the others' past, and of what of it the asynchronous proxy knows.
struct Clock {
  std::array<uint32_t, AGENTS> seen{}, fenced{};

  void join(const Clock& other);
};

struct Access {
  int block, agent;
  uint32_t moment;  // by the agent's own clock, from 1 on
};

class Races {
 public:
  uint64_t blocks = 0;                    // that have run, of all launches
  std::vector<Clock> clocks;              // of threads
  std::vector<uint32_t> products;         // groups of them that each thread has committed
  std::array<uint32_t, BARRIERS> copies;  // that were begun for each barrier

  void begin_launch(size_t shared_bytes);
  void begin_block(int number, unsigned threads);

  // What the thread did before is told of, what it does from now on is not.
  void tick(unsigned thread) { ++clocks[thread].seen[thread]; }
  void fence(unsigned thread);

  // From here on the block's barriers lie there, and nothing else.
  void reserve(const void* barrier, size_t size);

  // Kernels of this launch and later ones may use this memory; by none is everything forgotten.
  void allow(const void* pointer, size_t size);

  // An agent reads or writes; `known` is what the thread knows that does so or has it done.
  void touch(const void* pointer, size_t size, bool writes, int agent, uint32_t moment, const Clock& known);

 private:
  // A few bytes: who last wrote there, and who has read there since.
  struct Cell {
    Access written{}, first{};
    std::vector<Access> more;  // that have read
  };

  int block;
  std::map<uintptr_t, uintptr_t> allowed;                                 // ends by beginnings
  std::vector<Cell> words;                                                // of shared memory, of 4 bytes
  std::vector<bool> reserved;                                             // of them
  size_t shared_bytes, first_word = 0, last_word = 0;                     // what there is, and what was touched
  std::unordered_map<uintptr_t, std::array<Cell, 64>> variables, others;  // bytes of the library, and elsewhere

  void touch(Cell& cell, bool writes, const Access& self, const Clock& known, const char* where, size_t offset);
  void check(const char* now, const Access& past, const char* then, const Access& self, const Clock& known,
             const char* where, size_t offset) const;
};

inline Races races;

}  // namespace emulated
