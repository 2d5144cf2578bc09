// Picks the widest instruction set that this CPU has, once. SCOAT_FAST_ISA names a narrower one, to test or compare.
#include <cstdlib>
#include <string>

#include "engine.h"
#include "kernels.h"

namespace scoat {
namespace cpu {

#define SCOAT_DECLARE(name) void name(const Arguments&, int threads);
#define SCOAT_DECLARE_STEP(name, Step) void name(const Step&, int threads);
#define SCOAT_DECLARE_ALL         \
  SCOAT_KERNELS(SCOAT_DECLARE)    \
  SCOAT_STEPS(SCOAT_DECLARE_STEP) \
  int64_t panel();
#ifdef SCOAT_X86
namespace avx512 {
SCOAT_DECLARE_ALL
}
namespace avx2 {
SCOAT_DECLARE_ALL
}
#endif
namespace base {
SCOAT_DECLARE_ALL
}
#undef SCOAT_DECLARE_ALL
#undef SCOAT_DECLARE_STEP
#undef SCOAT_DECLARE

namespace {
enum class Level { base, avx2, avx512 };

Level level() {
#ifdef SCOAT_X86
  static const Level found = [] {
    __builtin_cpu_init();
    const char* named = std::getenv("SCOAT_FAST_ISA");
    const std::string most = named ? named : "avx512";
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx512 && most == "avx512") return Level::avx512;
    return avx2 && most != "base" ? Level::avx2 : Level::base;
  }();
  return found;
#else
  return Level::base;
#endif
}
}  // namespace

#ifdef SCOAT_X86
#define SCOAT_CALL(call)   \
  switch (level()) {       \
    case Level::avx512:    \
      return avx512::call; \
    case Level::avx2:      \
      return avx2::call;   \
    case Level::base:      \
      break;               \
  }                        \
  return base::call;
#else
#define SCOAT_CALL(call) return base::call;
#endif
#define SCOAT_DISPATCH_STEP(name, Step) \
  void name(const Step& step, int threads) { SCOAT_CALL(name(step, threads)) }
#define SCOAT_DISPATCH(name) SCOAT_DISPATCH_STEP(name, Arguments)
SCOAT_KERNELS(SCOAT_DISPATCH)
SCOAT_STEPS(SCOAT_DISPATCH_STEP)

int64_t panel() { SCOAT_CALL(panel()) }

const char* instruction_set() {
  switch (level()) {
    case Level::avx512:
      return "AVX-512";
    case Level::avx2:
      return "AVX2";
    case Level::base:
      return "baseline";
  }
  return "";
}

}  // namespace cpu
}  // namespace scoat
