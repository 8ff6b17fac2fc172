// Launch plans by name, so that the extension can show them without knowing the operators.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <type_traits>

namespace attnkern {

// What a plan is asked with and answers with: names and whole numbers, or words. Sizes and device properties in,
// choices out.
struct PlanQuery {
  std::map<std::string, int64_t> numbers;

  // The number of that name, or `otherwise` where the query has none.
  template <class T = int64_t>
  T get(const char* name, std::type_identity_t<T> otherwise) const {
    const auto found = numbers.find(name);
    return found == numbers.end() ? otherwise : static_cast<T>(found->second);
  }
};
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
