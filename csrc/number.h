// Numbers that the compiler knows, as arguments of generic lambdas.
#pragma once

namespace fibkv {
namespace FIBKV_ISA {

template <int value>
struct Number {
  static constexpr int number = value;
  constexpr operator int() const { return value; }
};

// Calls visit(planes): with a number that the compiler knows where there are 1, 2, 4 or 8.
template <typename Visit>
inline void with_planes(int planes, Visit visit) {
  switch (planes) {
    case 1: return visit(Number<1>{});
    case 2: return visit(Number<2>{});
    case 4: return visit(Number<4>{});
    case 8: return visit(Number<8>{});
    default: return visit(planes);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
