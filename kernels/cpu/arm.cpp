#include "arm.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <cstddef>
#include <sys/sysctl.h>
#endif

namespace ace {
namespace {

// The bits of HWCAP and HWCAP2 are Linux's: old headers do not name them.
[[maybe_unused]] constexpr unsigned long DOT_PRODUCT = 1ul << 20, BF16_MATRICES = 1ul << 14;

#if defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
    int there = 0;
    size_t size = sizeof there;
    return sysctlbyname(name, &there, &size, nullptr, 0) == 0 && there != 0;
}
#endif

}  // namespace

bool has_dot_product() {
#if !ACE_ARM_EXTENSIONS
    return false;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & DOT_PRODUCT) != 0;
#elif defined(__APPLE__)
    return has_feature("hw.optional.arm.FEAT_DotProd");
#else
    return false;
#endif
}

bool has_bf16_matrices() {
#if !ACE_ARM_EXTENSIONS
    return false;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP2) & BF16_MATRICES) != 0;
#elif defined(__APPLE__)
    return has_feature("hw.optional.arm.FEAT_BF16");
#else
    return false;
#endif
}

}  // namespace ace
