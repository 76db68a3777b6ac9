#include "perf/moe/npy.h"

#include <climits>
#include <cstring>

namespace moe::perf {

namespace {

// A cursor over the header, which is a Python dictionary literal.
class Cursor {
 public:
  Cursor(const char* text, size_t size) : text_(text), size_(size) {}

  bool take(char c) {
    skipBlanks();
    if (at_ >= size_ || text_[at_] != c) return false;
    at_++;
    return true;
  }

  bool takeWord(const char* word) {
    skipBlanks();
    const size_t n = strlen(word);
    if (size_ - at_ < n || memcmp(text_ + at_, word, n) != 0) return false;
    at_ += n;
    return true;
  }

  // A string in single or double quotes; the format's writers never need escapes.
  bool takeString(std::string* value) {
    skipBlanks();
    if (at_ >= size_ || (text_[at_] != '\'' && text_[at_] != '"')) return false;
    const char quote = text_[at_];
    const size_t begin = at_ + 1;
    size_t end = begin;
    while (end < size_ && text_[end] != quote) {
      if (text_[end] == '\\' || text_[end] == '\n') return false;
      end++;
    }
    if (end == size_) return false;
    value->assign(text_ + begin, end - begin);
    at_ = end + 1;
    return true;
  }

  bool takeNumber(uint64_t* value) {
    skipBlanks();
    const size_t begin = at_;
    uint64_t v = 0;
    while (at_ < size_ && text_[at_] >= '0' && text_[at_] <= '9') {
      const uint64_t digit = static_cast<uint64_t>(text_[at_] - '0');
      if (v > (UINT64_MAX - digit) / 10) return false;
      v = v * 10 + digit;
      at_++;
    }
    if (at_ == begin) return false;
    if (at_ < size_ && text_[at_] == 'L') at_++; // Python 2 wrote long integers so
    *value = v;
    return true;
  }

  bool atEnd() {
    skipBlanks();
    return at_ == size_;
  }

 private:
  void skipBlanks() {
    while (at_ < size_ && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) at_++;
  }

  const char* text_;
  size_t size_;
  size_t at_ = 0;
};

constexpr size_t kMaxDims = 32; // NumPy's own limit

bool takeShape(Cursor& cursor, std::vector<uint64_t>* shape) {
  if (!cursor.take('(')) return false;
  shape->clear();
  while (!cursor.take(')')) {
    uint64_t n = 0;
    if (shape->size() == kMaxDims || !cursor.takeNumber(&n)) return false;
    shape->push_back(n);
    if (cursor.take(',')) continue;
    if (!cursor.take(')')) return false;
    return shape->size() != 1; // "(3)" is a number, not a tuple
  }
  return true;
}

bool parseDictionary(Cursor& cursor, NpyArray* array, std::string* error) {
  bool haveDescr = false;
  bool haveOrder = false;
  bool haveShape = false;
  *error = "the .npy header is not a dictionary of 'descr', 'fortran_order' and 'shape'";
  if (!cursor.take('{')) return false;
  while (!cursor.take('}')) {
    std::string key;
    if (!cursor.takeString(&key) || !cursor.take(':')) return false;
    if (key == "descr" && !haveDescr) {
      haveDescr = cursor.takeString(&array->descr);
      if (!haveDescr) *error = "the .npy header's 'descr' is not a simple type";
      if (!haveDescr) return false;
    } else if (key == "fortran_order" && !haveOrder) {
      array->fortranOrder = cursor.takeWord("True");
      haveOrder = array->fortranOrder || cursor.takeWord("False");
      if (!haveOrder) return false;
    } else if (key == "shape" && !haveShape) {
      haveShape = takeShape(cursor, &array->shape);
      if (!haveShape) *error = "the .npy header's 'shape' is not a tuple of sizes";
      if (!haveShape) return false;
    } else {
      return false;
    }
    if (cursor.take(',')) continue;
    if (!cursor.take('}')) return false;
    break;
  }
  if (!haveDescr || !haveOrder || !haveShape || !cursor.atEnd()) return false;
  error->clear();
  return true;
}

// Bytes of an element of a simple type such as "<i8"; 0 where descr is none.
uint64_t elementBytes(const std::string& descr) {
  if (descr.size() < 3 || descr.size() > 6 || strchr("<>|=", descr[0]) == nullptr) return 0;
  if (strchr("biufc", descr[1]) == nullptr) return 0;
  uint64_t n = 0;
  for (size_t i = 2; i < descr.size(); i++) {
    if (descr[i] < '0' || descr[i] > '9') return 0;
    n = n * 10 + static_cast<uint64_t>(descr[i] - '0');
  }
  return n;
}

} // namespace

bool parseNpy(const uint8_t* bytes, size_t size, NpyArray* array, std::string* error) {
  static const uint8_t magic[6] = {0x93, 'N', 'U', 'M', 'P', 'Y'};
  if (size < 10 || memcmp(bytes, magic, sizeof(magic)) != 0) {
    *error = "not a .npy file";
    return false;
  }
  const int major = bytes[6];
  if (major < 1 || major > 3) {
    *error = "version " + std::to_string(major) + " of .npy is not known";
    return false;
  }
  const size_t prefix = major == 1 ? 10 : 12;
  if (size < prefix) {
    *error = "the .npy header is cut short";
    return false;
  }
  uint64_t headerBytes = bytes[8] | static_cast<uint64_t>(bytes[9]) << 8;
  if (major > 1) headerBytes |= static_cast<uint64_t>(bytes[10]) << 16 | static_cast<uint64_t>(bytes[11]) << 24;
  if (headerBytes > size - prefix) {
    *error = "the .npy header is cut short";
    return false;
  }
  Cursor cursor(reinterpret_cast<const char*>(bytes) + prefix, headerBytes);
  if (!parseDictionary(cursor, array, error)) return false;
  const uint64_t element = elementBytes(array->descr);
  if (element == 0) {
    *error = "type '" + array->descr + "' of the .npy file is not known";
    return false;
  }
  array->data = bytes + prefix + headerBytes;
  array->dataBytes = size - prefix - headerBytes;
  uint64_t needed = element;
  for (const uint64_t n : array->shape) {
    if (n != 0 && needed > UINT64_MAX / n) {
      *error = "the shape in the .npy header overflows";
      return false;
    }
    needed *= n;
  }
  if (needed > array->dataBytes) {
    *error = "the .npy file has " + std::to_string(array->dataBytes) + " bytes of data; its header says " +
             std::to_string(needed);
    return false;
  }
  array->dataBytes = needed;
  return true;
}

bool npyToIndices(const NpyArray& array, uint64_t* rows, uint64_t* columns, std::vector<int>* ids, std::string* error) {
  const bool wide = array.descr == "<i8";
  if (!wide && array.descr != "<i4") {
    *error = "type '" + array.descr + "' of the .npy file is not little-endian int32 or int64";
    return false;
  }
  if (array.shape.size() != 2 || array.fortranOrder) {
    *error = "the .npy file is not a two-dimensional array in C order";
    return false;
  }
  *rows = array.shape[0];
  *columns = array.shape[1];
  const size_t n = array.dataBytes / (wide ? 8 : 4);
  ids->resize(n);
  for (size_t i = 0; i < n; i++) {
    int64_t id = 0;
    if (wide) {
      memcpy(&id, array.data + i * 8, 8);
    } else {
      int32_t narrow = 0;
      memcpy(&narrow, array.data + i * 4, 4);
      id = narrow;
    }
    if (id < INT_MIN || id > INT_MAX) {
      *error = "element " + std::to_string(i) + " of the .npy file, " + std::to_string(id) + ", is no expert id";
      return false;
    }
    (*ids)[i] = static_cast<int>(id);
  }
  return true;
}

} // namespace moe::perf
