// Numbers as text without streams: those take the facets of a locale, which break where libstdc++ is linked into this
// module a second time, beside the one that the process has.
#pragma once

#include <cstdio>
#include <string>

namespace neo {

// As in "30" or "0.25".
inline std::string decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace neo
