// Launch plans by name, so that the extension can show them without knowing the operators.
#pragma once

#include <map>
#include <string>

namespace attnkern {

// What a plan is asked with and answers with: names and whole numbers, or words. Sizes and device properties in,
// choices out.
using PlanQuery = std::map<std::string, int64_t>;
using PlanAnswer = std::map<std::string, std::string>;
using PlanFunction = PlanAnswer (*)(const PlanQuery&);

inline std::map<std::string, PlanFunction>& plans() {
  static std::map<std::string, PlanFunction> registry;
  return registry;
}

struct RegisterPlan {
  RegisterPlan(const char* name, PlanFunction function) { plans()[name] = function; }
};

}  // namespace attnkern
