"""How a spec is run: op by op, in a CUDA graph, in one call into C++. Each gives the same results."""
