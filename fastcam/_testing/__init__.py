"""What tests and benchmarks share; nothing in the library imports it."""
