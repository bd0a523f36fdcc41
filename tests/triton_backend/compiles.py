"""Compiles variants for device classes and prints what stands in their machine code, one JSON object a line.

    python tests/triton_backend/compiles.py --classes 80 90 [--all] [--names layer_norm_kernel ...]
"""

import argparse
import json
import os
import sys

from clinfast.triton_kernels import configs
from clinfast.triton_kernels.variants import KERNELS, shipped, tabled


def chosen(of_class, everything):
    """All variants, or one of every code path: dtypes and widths that change nothing but constants are left out."""
    if everything:
        return shipped(of_class) + tabled(of_class)
    kept, seen = [], set()
    for variant in shipped(of_class) + tabled(of_class):
        if variant.kernel == "attention_kernel":
            head_dim, _, _, _, heads, window, _ = variant.constants
            biased = "-" not in variant.types
            path = (variant.types[0], head_dim if window < 0 else 0, heads, variant.num_warps, window, biased)
            if path[0] == "fp16" or (head_dim != 64 and (path[0] == "fp32" or window > 0 or biased)):
                continue
            path = (*path, variant.constants[2] if head_dim == 64 else 0)
        elif KERNELS[variant.kernel].matrix:
            path = (variant.kernel, variant.types, variant.constants[1:4], variant.constants[-2] is False)
            path = (*path, variant.constants[0] in ("gelu", "none"))
            if "fp16" in variant.types or variant.constants[0] in ("gelu_tanh", "relu", "tanh"):
                continue
        elif of_class not in (80, 90) and variant.kernel not in ("layer_norm_kernel", "pack_kernel"):
            continue
        elif variant.kernel == "layer_norm_kernel":
            path = (variant.kernel, variant.types[1], variant.constants[1] >= 1024)
        elif variant.kernel == "pooling_kernel":
            path = (variant.kernel, variant.constants[0])
        else:
            path = (variant.kernel, variant.constants if variant.kernel == "pack_kernel" else 0)
        if path not in seen:
            seen.add(path)
            kept.append(variant)
    return kept


def facts(variant, of_class):
    from clinfast.triton_kernels.compiling import compile_variant, static

    made = compile_variant(variant, of_class)
    found = static(made.cubin, made.shared)._asdict()
    return {"class": of_class, "key": variant.key, "kernel": variant.kernel, "types": variant.types, **found}


def main():
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, nargs="+", default=list(configs.CLASSES))
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    for of_class in options.classes:
        for variant in chosen(of_class, options.all):
            try:
                found = facts(variant, of_class)
            except Exception as error:
                found = {"class": of_class, "key": variant.key, "error": str(error)[:2000]}
            print(json.dumps(found), flush=True)
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    sys.exit(main())
