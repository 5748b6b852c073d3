// Queries are taken in blocks of a size that the compiler knows: 8, 4, 2 or 1.
#pragma once

namespace fibkv {
namespace FIBKV_ISA {

constexpr int kMostQueries = 8;

template <int count>
struct Block {
  static constexpr int size = count;
  int first;  // query
  int index;  // of the block
};

// Calls visit(Block<size>) for each block of n queries.
template <typename Visit>
inline void each_block(int n, Visit visit) {
  int index = 0;
  for (int q = 0; q < n; ++index) {
    const int left = n - q;
    if (left >= 8) {
      visit(Block<8>{q, index});
      q += 8;
    } else if (left >= 4) {
      visit(Block<4>{q, index});
      q += 4;
    } else if (left >= 2) {
      visit(Block<2>{q, index});
      q += 2;
    } else {
      visit(Block<1>{q, index});
      q += 1;
    }
  }
}

inline int num_blocks(int n) { return n / 8 + (n % 8 / 4) + (n % 4 / 2) + n % 2; }

}  // namespace FIBKV_ISA
}  // namespace fibkv
