"""GPU kernels of the ops: a file holds kernels, their launches and their tile choices. Imported at the first launch.

Every kernel adds in float32 in a fixed order, uses no atomics and computes row offsets in 64 bits. float64 tensors are
refused here with a TypeError: `ultramem.ops.use_implementation(Implementation.ATEN)` serves them on any device.
"""
