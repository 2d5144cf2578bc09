// Picks the widest instruction set that this CPU has, once.
#include "kernels.h"

namespace scoat {
namespace cpu {

#define SCOAT_DECLARE(name) void name(const Arguments&, int threads);
#ifdef SCOAT_X86
namespace avx512 {
SCOAT_KERNELS(SCOAT_DECLARE)
}
namespace avx2 {
SCOAT_KERNELS(SCOAT_DECLARE)
}
#endif
namespace base {
SCOAT_KERNELS(SCOAT_DECLARE)
}
#undef SCOAT_DECLARE

namespace {
enum class Level { base, avx2, avx512 };

Level level() {
#ifdef SCOAT_X86
  static const Level found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return Level::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Level::avx2 : Level::base;
  }();
  return found;
#else
  return Level::base;
#endif
}
}  // namespace

#ifdef SCOAT_X86
#define SCOAT_DISPATCH(name)                           \
  void name(const Arguments& arguments, int threads) { \
    switch (level()) {                                 \
      case Level::avx512:                              \
        return avx512::name(arguments, threads);       \
      case Level::avx2:                                \
        return avx2::name(arguments, threads);         \
      case Level::base:                                \
        return base::name(arguments, threads);         \
    }                                                  \
  }
#else
#define SCOAT_DISPATCH(name) \
  void name(const Arguments& arguments, int threads) { base::name(arguments, threads); }
#endif
SCOAT_KERNELS(SCOAT_DISPATCH)

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
