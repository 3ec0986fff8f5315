"""Measuring: workloads, benchmarks and evaluation."""
