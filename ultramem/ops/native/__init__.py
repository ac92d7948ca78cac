"""The CPU kernels: a C++ header an op, `library.cc` that makes PyTorch ops of them, and what builds and loads it.

The headers hold no PyTorch: they take pointers, sizes and something that runs a loop on threads.
"""
