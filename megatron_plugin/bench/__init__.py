"""Kernel microbenchmarks: cases with their truth, contenders, and rounds that time them in turn.  `megatron-plugin bench` and benchmarks/ use them."""
