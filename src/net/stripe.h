// How a message is cut into pieces, one for each socket or queue pair.
#pragma once

#include <algorithm>
#include <cstddef>

namespace moe {
namespace net {

struct Stripe {
  size_t offset;
  size_t bytes;
};

// At most maxPieces, and none below minBytes unless it is the only one.
inline int stripeCount(size_t bytes, int maxPieces, size_t minBytes) {
  return static_cast<int>(std::max<size_t>(1, std::min<size_t>(static_cast<size_t>(maxPieces), bytes / minBytes)));
}

// Pieces begin at multiples of 128 bytes; none is empty as long as there are at least 128 bytes per piece.
inline Stripe stripe(size_t bytes, int nPieces, int i) {
  const size_t each = (bytes / static_cast<size_t>(nPieces) + 127) / 128 * 128;
  const size_t begin = std::min(bytes, each * static_cast<size_t>(i));
  const size_t end = i == nPieces - 1 ? bytes : std::min(bytes, begin + each);
  return {begin, end - begin};
}

} // namespace net
} // namespace moe
