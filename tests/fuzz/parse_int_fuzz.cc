// Numbers of environment variables and options: what is accepted is a whole number that means what it says.
#include <cstdlib>
#include <string>

#include "base/param.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  constexpr int64_t untouched = 0x5a5a5a5a5a5a5a5a;
  int64_t value = untouched;
  if (!moe::parseInt(text.data(), &value)) return 0; // up to the first NUL
  // An accepted text is digits, maybe with a sign before and a unit behind; its number in plain digits reads the same.
  const std::string seen(text, 0, text.find('\0'));
  size_t digits = seen[0] == '-' ? 1 : 0;
  const size_t first = digits;
  while (digits < seen.size() && seen[digits] >= '0' && seen[digits] <= '9') digits++;
  if (digits == first) abort();
  int shift = 0;
  if (digits < seen.size()) {
    const size_t unit = std::string("KMGkmg").find(seen[digits]);
    if (unit == std::string::npos || digits + 1 != seen.size()) abort();
    shift = 10 * static_cast<int>(unit % 3 + 1);
  }
  const __int128 expected = static_cast<__int128>(strtoll(seen.c_str(), nullptr, 10)) * (__int128{1} << shift);
  if (expected != value) abort();
  int64_t again = untouched;
  if (!moe::parseInt(std::to_string(value).c_str(), &again) || again != value) abort();
  return 0;
}
