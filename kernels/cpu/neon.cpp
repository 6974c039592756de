#if defined(__aarch64__)

#include "neon_dotprod.h"

#define ACE_WIDTH 4
#define ACE_NEON 1
#define ACE_ISA "neon"
#define ACE_BODIES neon_bodies
#include "bodies.h"

#if ACE_ARM_EXTENSIONS
namespace ace {
namespace {

constexpr Bodies with_dot_product(Bodies bodies) {
    bodies.name = "neon_dotprod";
    bodies.round_tokens = round_tokens_dotprod;
    bodies.few_bits_linear = few_bits_linear_dotprod;
    return bodies;
}

}  // namespace

const Bodies neon_dotprod_bodies = with_dot_product(neon_bodies);

}  // namespace ace
#endif

#endif
