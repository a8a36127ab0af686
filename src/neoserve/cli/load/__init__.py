"""What the benchmarks that put load on an engine share."""
