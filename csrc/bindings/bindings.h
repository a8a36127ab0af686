// The parts of the Python module neoserve._native; what each does is said in src/neoserve/_native.pyi.
#pragma once

#include <nanobind/nanobind.h>

namespace neo {

void bind_machine(nanobind::module_& module);
void bind_memory(nanobind::module_& module);
void bind_worker_pool(nanobind::module_& module);
void bind_host_attention(nanobind::module_& module);
void bind_driver_calls(nanobind::module_& module);

}  // namespace neo
