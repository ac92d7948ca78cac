"""How benchmarks are run: every contender checked first, then timed interleaved, each row in a process of its own."""
