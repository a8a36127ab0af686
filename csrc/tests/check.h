// The smallest test frame that serves: a failed CHECK prints where and what, and the program's exit status says so.
#pragma once

#include <cstdio>
#include <cstdlib>

inline int failed_checks = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failed_checks;                                                     \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
    }                                                                      \
  } while (false)
