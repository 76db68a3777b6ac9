// Which send meets which receive.
//
// Each tag is a queue of its own: the k-th send with a tag meets the k-th receive with it.  So (tag, k) names a message
// on both sides before either has heard of the other, and a receiver can tell the sender where message (tag, k) may go
// (a grant) as soon as the receive is posted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace moe {
namespace net {

class TagCounters {
 public:
  uint64_t next(int tag) { return counters_[tag]; }
  uint64_t take(int tag) { return counters_[tag]++; }

 private:
  std::unordered_map<int, uint64_t> counters_;
};

// The receiving side's receives that no message has met yet.
class PostedReceives {
 public:
  struct Entry {
    int tag;
    uint64_t index;
    uint32_t slot;
  };
  uint64_t post(int tag, uint32_t slot) {
    const uint64_t index = counters_.take(tag);
    entries_.push_back({tag, index, slot});
    return index;
  }
  Entry* find(int tag, uint64_t index) {
    for (Entry& entry : entries_) {
      if (entry.tag == tag && entry.index == index) return &entry;
    }
    return nullptr;
  }
  void erase(uint32_t slot) {
    for (size_t i = 0; i < entries_.size(); i++) {
      if (entries_[i].slot == slot) {
        entries_.erase(entries_.begin() + static_cast<ptrdiff_t>(i));
        return;
      }
    }
  }
  // A message with this index has no business here: its receive is long gone.
  bool isPast(int tag, uint64_t index) { return index < counters_.next(tag) && find(tag, index) == nullptr; }

 private:
  std::vector<Entry> entries_; // in the order of posting; at most maxRequests * maxGroup
  TagCounters counters_;
};

// The sending side's permissions.
class Grants {
 public:
  struct Entry {
    int tag;
    uint64_t index;
    uint64_t room;
    uint32_t slot;
    uint64_t generation;
  };
  void add(const Entry& entry) { entries_.push_back(entry); }
  const Entry* find(int tag, uint64_t index) const {
    for (const Entry& entry : entries_) {
      if (entry.tag == tag && entry.index == index) return &entry;
    }
    return nullptr;
  }
  // Message (tag, index) has been sent, with or without its grant.
  void drop(int tag, uint64_t index) {
    for (size_t i = 0; i < entries_.size(); i++) {
      if (entries_[i].tag == tag && entries_[i].index <= index) {
        entries_.erase(entries_.begin() + static_cast<ptrdiff_t>(i--));
      }
    }
  }
  size_t size() const { return entries_.size(); }

 private:
  std::vector<Entry> entries_;
};

} // namespace net
} // namespace moe
