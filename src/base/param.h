// Parameters from the environment: named, typed, bounded, documented, read once at first use and logged when set.
//
//   static IntParam timeoutMs{"NCCL_MOE_TIMEOUT_MS", 100000, 1, INT_MAX, "milliseconds until a wait on a peer ends"};
//   ... timeoutMs.get() ...
//
// A value that does not parse or is out of bounds is reported by WARN and the default holds.  docs/env.md lists them
// all.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace moe {

class IntParam {
 public:
  constexpr IntParam(const char* name, int64_t def, int64_t min, int64_t max, const char* doc)
    : name_(name), doc_(doc), value_(def), min_(min), max_(max) {}
  int64_t get();

 private:
  const char* name_;
  const char* doc_;
  int64_t value_, min_, max_;
  std::once_flag once_;
};

class StringParam {
 public:
  enum Log { value, nameAlone }; // nameAlone: the value is a secret
  StringParam(const char* name, const char* def, const char* doc, Log log = value)
    : name_(name), doc_(doc), log_(log), value_(*new std::string(def)) {}
  const std::string& get();

 private:
  const char* name_;
  const char* doc_;
  Log log_;
  std::string& value_; // never destroyed: what runs when the process exits reads it still
  std::once_flag once_;
};

// A whole decimal number with an optional K, M or G (powers of 1024); false if text is anything else.
bool parseInt(const char* text, int64_t* value);

} // namespace moe
