// Lists without repeats, of a few items: the sides and spaces of a step.
#pragma once

#include <algorithm>
#include <vector>

namespace fibkv {

template <typename T>
int index_of(const std::vector<T>& items, const T& item) {
  return static_cast<int>(std::find(items.begin(), items.end(), item) - items.begin());
}

template <typename T>
void add_once(std::vector<T>& items, const T& item) {
  if (index_of(items, item) == static_cast<int>(items.size())) items.push_back(item);
}

}  // namespace fibkv
