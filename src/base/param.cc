#include "base/param.h"

#include <cerrno>
#include <cstdlib>

#include "base/log.h"

namespace moe {

bool parseInt(const char* text, int64_t* value) {
  if (text == nullptr || (text[0] != '-' && (text[0] < '0' || text[0] > '9'))) return false;
  char* end = nullptr;
  errno = 0;
  const long long number = strtoll(text, &end, 10);
  if (errno != 0 || end == text) return false;
  int shift = 0;
  if (*end == 'K' || *end == 'k') shift = 10;
  if (*end == 'M' || *end == 'm') shift = 20;
  if (*end == 'G' || *end == 'g') shift = 30;
  if (shift != 0) end++;
  if (*end != '\0') return false;
  return !__builtin_mul_overflow(number, int64_t{1} << shift, value);
}

int64_t IntParam::get() {
  std::call_once(once_, [this] {
    const char* text = getenv(name_);
    if (text == nullptr) return;
    int64_t value = 0;
    if (!parseInt(text, &value) || value < min_ || value > max_) {
      MOE_WARN("%s=%s ignored: %s, %lld to %lld; using %lld", name_, text, doc_, static_cast<long long>(min_),
               static_cast<long long>(max_), static_cast<long long>(value_));
      return;
    }
    value_ = value;
    MOE_INFO("%s set by environment to %lld", name_, static_cast<long long>(value_));
  });
  return value_;
}

const std::string& StringParam::get() {
  std::call_once(once_, [this] {
    const char* text = getenv(name_);
    if (text == nullptr) return;
    value_ = text;
    MOE_INFO("%s (%s) set by environment%s%s", name_, doc_, log_ == value ? " to " : "", log_ == value ? text : "");
  });
  return value_;
}

} // namespace moe
