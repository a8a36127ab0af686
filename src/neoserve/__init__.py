"""NEO: an LLM serving engine that keeps part of the KV cache, and its attention, on the CPU."""
