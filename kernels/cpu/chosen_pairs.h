// Products of many bf16 tokens with a packed bf16 weight 2:4, by vectors. The two kept weights of a group of four
// inputs meet one of its six pairs of inputs. All six are made beforehand, so half of the products suffice, and the two
// values are multiplied as they are stored.
#pragma once

#include "expanded_product.h"

namespace ace {

// Pairs of inputs in a group of four, and words for each pair of inputs of the tokens, instead of one.
constexpr int64_t CHOICES = 6, CHOSEN_WORDS = CHOICES / 2;
// Tokens that are multiplied by one pass over the weight: their pairs take three times the room, and the weight's values
// need no expansion in the next pass.
constexpr int64_t MOST_CHOSEN_TOKENS = 128;

// True if a weight is multiplied in this way.
bool takes_chosen_pairs(const ExpandedTask& task);

// Makes the six pairs of all groups for the tokens of block `block`. `task.pairs` has room for CHOSEN_WORDS times the
// words of pair_tokens: uint32 [token blocks by two, groups of inputs, CHOICES, tokens].
void choose_pairs(const ExpandedTask& task, int64_t block);

// Computes outputs begin..end of all tokens, as expanded_product; the sums are all that it needs of the scratch.
void chosen_pairs_product(const ExpandedTask& task, float* sums, int64_t begin, int64_t end);

}  // namespace ace
