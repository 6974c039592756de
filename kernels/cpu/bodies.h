// All operations as the table ACE_BODIES, compiled for the instruction set that the including file selects.
// Do not use standard-library templates here: the linker keeps only one copy of each, so code for a newer instruction
// set could run on an older machine.
#pragma once

#include "adamw.h"
#include "assignment.h"
#include "byte_inputs.h"
#include "decoding.h"
#include "divergence.h"
#include "few_bits.h"
#include "join_gains.h"
#include "moments.h"
#include "nm_linear.h"
#include "pack_nm.h"
#include "pack_rows.h"
#include "round_groups.h"
#include "select_nm.h"
#include "select_rows.h"
#include "sums.h"
#include "two_of_four.h"
#include "unpack_nm.h"
#include "variance_factor.h"

namespace ace {

const Bodies ACE_BODIES = {
    ACE_ISA,    select_nm,   select_rows, count_keys, find_ties,        apply_cut,
    weight_sums, token_norms, all_finite,  moments,    weighted_squares,
    variance_levels, variance_factor, divergence, adamw, join_gains, assign,
    pack_nm,    find_kept,   pack_rows,   unpack_nm,  widen_rows,       nm_linear, dense_linear,
    round_tokens, round_to_bytes, few_bits_linear,
    rms_norm, rotate_head, attend, gate,
    round_groups,
};

}  // namespace ace
