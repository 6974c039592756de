// Expands the integers of quantized weights to bf16 numbers, for expanded_product.
#pragma once

#include "expanded_product.h"

namespace ace {

// Expands a block that begins with an even step.
void expand_integers(const ExpandedTask& task, const Block& block, uint32_t* to);

}  // namespace ace
