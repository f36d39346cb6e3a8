// Rows of image features and rows of packed tokens. positions[i] is the packed row of feature row
// i, rising; the other packed rows are text. Each function is one binary search.
#pragma once

#include "host_device.h"

namespace mmalign {

// How many of the positions lie before a packed row.
template <class Index>
HOST_DEVICE int64_t image_rows_before(const Index* positions, int64_t num_positions, int64_t row) {
  int64_t low = 0, high = num_positions;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (positions[middle] < row) low = middle + 1; else high = middle;
  }
  return low;
}

// The feature row that lands on a packed row; -1 where the row is text.
template <class Index>
HOST_DEVICE int64_t image_row_at(const Index* positions, int64_t num_positions, int64_t row) {
  const int64_t found = image_rows_before(positions, num_positions, row);
  return found < num_positions && positions[found] == row ? found : -1;
}

// The packed row of the text-th row of text: text plus the image rows before it, which are those
// with positions[i] - i <= text.
template <class Index>
HOST_DEVICE int64_t packed_row_of_text(const Index* positions, int64_t num_positions,
                                       int64_t text) {
  int64_t low = 0, high = num_positions;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (positions[middle] - middle <= text) low = middle + 1; else high = middle;
  }
  return text + low;
}

}  // namespace mmalign
