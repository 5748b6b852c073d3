// Code bytes between the canonical order and those of `Order`.
#pragma once

#include "side.h"

namespace fibkv {

// `rows` [tokens][code_bytes], `ordered` as the side says; padding of tiles is not touched.
void put_in_order(const Side& side, int tokens, const uint8_t* rows, uint8_t* ordered);
void put_in_rows(const Side& side, int tokens, const uint8_t* ordered, uint8_t* rows);

}  // namespace fibkv
