"""The CPU kernels: a C++ header an op, and what builds and loads them.

`library.cc` makes PyTorch ops of them, `onnx/library.cc` the plugin library of ONNX Runtime.

The headers hold no PyTorch: they take pointers, sizes and something that runs a loop on threads.
"""
