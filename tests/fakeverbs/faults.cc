// Scripted faults.  A script is a list of rules separated by ';':
//
//   POINT[@DEVICE]#N[+]=ACTION     at the Nth call of POINT (with '+': at this and every later one)
//   now[@DEVICE]=ACTION            at once, and
//   clear                          forgets the rules so far: both for fakeverbsInject
//
// POINT is a verb without its prefix (create_qp, reg_mr, reg_dmabuf_mr, post_send, poll_cq, modify_qp, ...), or wc,
// wc.send, wc.recv: the Nth completion.  ACTION is
//   ENOMEM, EINVAL, ... or a number   the verb fails with that errno (poll_cq: returns -1)
//   status:NAME                       the completion gets that status (RETRY_EXC_ERR, ...), its queue pair fails
//   event:NAME                        an asynchronous event (PORT_ERR, DEVICE_FATAL, QP_FATAL, GID_CHANGE, ...)
//   portdown, portup                  the device's ports lose or regain the link, with the event
//   stall                             at post_send: the queue pair sends nothing from this request on, as after a lost
//                                     packet with a long timeout, until
//   go                                all stalled queue pairs of the device go on
//   kill                              SIGKILL for the own process
// Calls are counted for each rule by itself.
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "fake.h"

namespace fake {
namespace {

struct Rule {
  std::string point, device, action;
  long nth = 0, calls = 0;
  bool onwards = false;
};

std::atomic<bool> anyRules{false};
int fired = 0; // rules that have acted, since the last clear

std::vector<Rule>& rules() {
  static auto* list = std::make_unique<std::vector<Rule>>().release(); // outlives the engine thread
  return *list;
}

const std::pair<const char*, int> errnos[] = {{"ENOMEM", ENOMEM},       {"EINVAL", EINVAL},         {"EIO", EIO},
                                              {"EAGAIN", EAGAIN},       {"EINTR", EINTR},           {"EPERM", EPERM},
                                              {"EACCES", EACCES},       {"ENODEV", ENODEV},         {"EBUSY", EBUSY},
                                              {"ETIMEDOUT", ETIMEDOUT}, {"EOPNOTSUPP", EOPNOTSUPP}, {"EFAULT", EFAULT}};

const char* const statuses[] = {
  "SUCCESS",           "LOC_LEN_ERR",       "LOC_QP_OP_ERR",    "LOC_EEC_OP_ERR",     "LOC_PROT_ERR",   "WR_FLUSH_ERR",
  "MW_BIND_ERR",       "BAD_RESP_ERR",      "LOC_ACCESS_ERR",   "REM_INV_REQ_ERR",    "REM_ACCESS_ERR", "REM_OP_ERR",
  "RETRY_EXC_ERR",     "RNR_RETRY_EXC_ERR", "LOC_RDD_VIOL_ERR", "REM_INV_RD_REQ_ERR", "REM_ABORT_ERR",  "INV_EECN_ERR",
  "INV_EEC_STATE_ERR", "FATAL_ERR",         "RESP_TIMEOUT_ERR", "GENERAL_ERR"};

const char* const events[] = {"CQ_ERR",
                              "QP_FATAL",
                              "QP_REQ_ERR",
                              "QP_ACCESS_ERR",
                              "COMM_EST",
                              "SQ_DRAINED",
                              "PATH_MIG",
                              "PATH_MIG_ERR",
                              "DEVICE_FATAL",
                              "PORT_ACTIVE",
                              "PORT_ERR",
                              "LID_CHANGE",
                              "PKEY_CHANGE",
                              "SM_CHANGE",
                              "SRQ_ERR",
                              "SRQ_LIMIT_REACHED",
                              "QP_LAST_WQE_REACHED",
                              "CLIENT_REREGISTER",
                              "GID_CHANGE"};

int errnoOf(const std::string& name) {
  for (const auto& e : errnos)
    if (name == e.first) return e.second;
  char* end = nullptr;
  long n = strtol(name.c_str(), &end, 10);
  return !name.empty() && *end == 0 && n > 0 ? int(n) : 0;
}

template <size_t n> int indexOf(const char* const (&names)[n], const std::string& name) {
  for (size_t i = 0; i < n; i++)
    if (name == names[i]) return int(i);
  return -1;
}

std::string suffix(const std::string& action, const char* prefix) {
  size_t n = strlen(prefix);
  return action.compare(0, n, prefix) == 0 ? action.substr(n) : std::string();
}

bool actionOk(const std::string& action) {
  return action == "kill" || action == "portdown" || action == "portup" || action == "go" || errnoOf(action) > 0 ||
         indexOf(statuses, suffix(action, "status:")) >= 0 || indexOf(events, suffix(action, "event:")) >= 0;
}

// Carries out an action; returns the errno if it is one.
int act(const std::string& action, Device& dev) {
  if (action == "kill") kill(getpid(), SIGKILL);
  if (action == "portdown" || action == "portup") {
    setPort(dev, action == "portdown");
    return 0;
  }
  if (action == "stall") return faultStall;
  if (action == "go") {
    for (const auto& q : state().qps)
      if (q.second->dev() == &dev && q.second->holdUntil == Time::max()) q.second->holdUntil = Time();
    engineWake();
    return 0;
  }
  int event = indexOf(events, suffix(action, "event:"));
  if (event >= 0) {
    auto type = ibv_event_type(event);
    // An event that names an object names one of the program's own.
    void* element = nullptr;
    for (const auto& q : state().qps)
      if (q.second->dev() == &dev) {
        element = type == IBV_EVENT_CQ_ERR ? static_cast<void*>(q.second->send_cq) : static_cast<ibv_qp*>(q.second);
        break;
      }
    bool ofQp = type == IBV_EVENT_CQ_ERR || (type >= IBV_EVENT_QP_FATAL && type <= IBV_EVENT_PATH_MIG_ERR) ||
                type == IBV_EVENT_QP_LAST_WQE_REACHED;
    if (!ofQp || element != nullptr) raiseEvent(dev, type, element, 1);
    return 0;
  }
  return errnoOf(action);
}

} // namespace

bool faultsParse(const char* script, std::string* error) {
  std::string text = script;
  size_t pos = 0;
  while (pos <= text.size()) {
    size_t end = std::min(text.find(';', pos), text.size());
    std::string item = text.substr(pos, end - pos);
    pos = end + 1;
    if (item.empty()) continue;
    if (item == "clear") {
      rules().clear();
      fired = 0;
      anyRules = false;
      continue;
    }
    *error = "bad fault rule '" + item + "'";
    size_t eq = item.find('=');
    if (eq == std::string::npos) return false;
    Rule rule;
    rule.action = item.substr(eq + 1);
    bool stalls = rule.action == "stall";
    if (!stalls && !actionOk(rule.action)) return false;
    std::string left = item.substr(0, eq);
    if (size_t hash = left.find('#'); hash != std::string::npos) {
      char* after = nullptr;
      rule.nth = strtol(left.c_str() + hash + 1, &after, 10);
      rule.onwards = strcmp(after, "+") == 0;
      if (rule.nth < 1 || (*after != 0 && !rule.onwards)) return false;
      left.resize(hash);
    }
    if (size_t at = left.find('@'); at != std::string::npos) {
      rule.device = left.substr(at + 1);
      left.resize(at);
    }
    rule.point = left;
    if (stalls && rule.point != "post_send") return false;
    if (rule.point == "now") {
      for (auto& dev : state().devices)
        if (rule.device.empty() || rule.device == dev->name) act(rule.action, *dev);
    } else {
      if (rule.nth < 1) return false;
      rules().push_back(rule);
      anyRules = true;
    }
  }
  error->clear();
  return true;
}

bool faultsAny() { return anyRules.load(std::memory_order_relaxed); }

int faultAt(const char* point, const ibv_context* context) {
  if (rules().empty() || state().devices.empty()) return 0;
  Device& dev = context != nullptr ? *static_cast<Device*>(context->device) : *state().devices[0];
  int result = 0;
  for (size_t i = 0; i < rules().size(); i++) {
    Rule& rule = rules()[i];
    if (rule.point != point || (!rule.device.empty() && rule.device != dev.name)) continue;
    rule.calls++;
    if (rule.calls == rule.nth || (rule.onwards && rule.calls > rule.nth)) {
      fired++;
      int e = act(rule.action, dev);
      if (e != 0) result = e;
    }
  }
  return result;
}

ibv_wc_status faultStatus(ibv_wc_status status, const char* point, const ibv_context* context) {
  if (rules().empty()) return status;
  Device& dev = *static_cast<Device*>(context->device);
  for (size_t i = 0; i < rules().size(); i++) {
    Rule& rule = rules()[i];
    if ((rule.point != point && rule.point != "wc") || (!rule.device.empty() && rule.device != dev.name)) continue;
    rule.calls++;
    if (rule.calls != rule.nth && !(rule.onwards && rule.calls > rule.nth)) continue;
    fired++;
    int s = indexOf(statuses, suffix(rule.action, "status:"));
    if (s >= 0)
      status = ibv_wc_status(s);
    else
      act(rule.action, dev);
  }
  return status;
}

} // namespace fake

extern "C" {

// Adds rules to the running process; 0 or EINVAL.
int fakeverbsInject(const char* script) {
  fake::Guard guard;
  std::string error;
  return fake::faultsParse(script, &error) ? 0 : EINVAL;
}

// How often rules have acted since the last clear.
int fakeverbsFired() {
  fake::Guard guard;
  return fake::fired;
}
}
