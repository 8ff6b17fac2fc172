// What a launcher returns: success, or the reason in words. Launchers never throw, exit or print.
#pragma once

namespace attnkern {

struct Status {
  const char* message = nullptr;  // static string; null is success
  bool ok() const { return message == nullptr; }
};

}  // namespace attnkern
