"""Run by `test_launching.py`: a machine without cubins for a shape and without a C compiler. Prints JSON."""

import json
import logging
import os

import torch
from launches import stubbed

stubbed()
os.environ.pop("CC", None)
os.environ["PATH"] = "/nowhere"
sentences = []
handler = logging.Handler()
handler.emit = lambda record: sentences.append(record.getMessage())
logging.getLogger("clinfast").addHandler(handler)

from clinfast.backends import triton  # noqa: E402
from clinfast.backends.triton.linear import GpuLinear  # noqa: E402
from clinfast.ops import layer_norm as op  # noqa: E402
from clinfast.ops import registry  # noqa: E402

# The CPU's tensors go where a GPU's would.
triton.unavailable = lambda: None
registry.BACKENDS["triton"] = registry.Backend("clinfast.backends.triton", ("cpu",), partial=True)
del registry.BACKENDS["cpu"]
layer_norm = registry.implementation("layer_norm", "triton", "cpu")
assert op.layer_norm is not None

x, ones = torch.randn(3, 64), torch.ones(64)
for _ in range(2):
    expected = torch.nn.functional.layer_norm(x, (64,), ones, ones, 1e-5)
    assert torch.equal(layer_norm(x, None, ones, ones, 1e-5), expected)
weight = torch.randn(32, 64).half()
linear = GpuLinear(weight, None, torch.float16)
y = linear(x.half(), "gelu")
assert torch.equal(y, torch.nn.functional.gelu(x.half() @ weight.T))
print(json.dumps({"served": {**registry.calls, "linear": linear.library}, "sentences": sentences}))
