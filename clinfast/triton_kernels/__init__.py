"""The Triton kernels: one module a stem, the tuning tables that choose their tiles, what compiles them ahead of time.

Nothing here knows torch. Pointers come with strides in elements; sizes are 32-bit, offsets that may pass 2**31 are
computed in 64 bits. Importing this package does not import Triton: `configs` and `variants` do without it.
"""
