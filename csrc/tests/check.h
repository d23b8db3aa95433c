// Checks of the C++ tests: a failed one is printed and counted, and the test goes on.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <random>

namespace rrt::tests {

inline int failures = 0;

inline bool report(const char* file, int line, const char* what) {
  // Enough to see what is wrong: a broken kernel fails in every element.
  const bool shown = ++failures <= 20;
  if (shown) std::cerr << file << ':' << line << ": failed: " << what << '\n';
  return shown;
}

template <class A, class B>
void check_equal(const char* file, int line, const char* what, const A& a, const B& b) {
  if (!(a == b) && report(file, line, what)) std::cerr << "  found " << a << " and " << b << '\n';
}

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) rrt::tests::report(__FILE__, __LINE__, #condition);    \
  } while (0)

#define CHECK_EQ(a, b) rrt::tests::check_equal(__FILE__, __LINE__, #a " == " #b, a, b)

#define CHECK_THROWS(expression, type)                                                        \
  do {                                                                                        \
    bool check_thrown = false;                                                                \
    try {                                                                                     \
      (void)(expression);                                                                     \
    } catch (const type&) {                                                                   \
      check_thrown = true;                                                                    \
    }                                                                                         \
    if (!check_thrown) rrt::tests::report(__FILE__, __LINE__, #expression " throws " #type);  \
  } while (0)

// The generator's numbers are fixed by the standard, those of its distributions are not.
using Random = std::mt19937_64;

inline int64_t between(Random& random, int64_t first, int64_t last) {
  return first + static_cast<int64_t>(random() % static_cast<uint64_t>(last - first + 1));
}

// Runs the tests, for main to return its result.
template <class... Tests>
int run(Tests... tests) {
  try {
    (tests(), ...);
  } catch (const std::exception& error) {
    report(__FILE__, __LINE__, error.what());
  }
  if (failures > 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace rrt::tests
