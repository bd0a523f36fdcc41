"""What each kernel takes, in terms that need no Triton, and which variants of it are compiled ahead of time.

A variant is a kernel with the dtypes of its arguments, its constants, warps and stages. Its `key` is what a launch
looks up among the cubins of the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clinfast.triton_kernels import configs

HIDDEN_WIDTHS = (128, 256, 512, 1024)
INNER_WIDTHS = (512, 1024, 2048, 4096)
# The least class that multiplies e4m3 with a scale a row.
FP8_CLASS = 90
NO_NORM = ("residual_ptr", "weight_ptr", "shift_ptr")
FLOATS = ("bf16", "fp16", "fp32")
# [batch, seqlen] tiles of `pack_kernel`, the smallest that holds the batch is taken.
PACK_TILES = ((1, 128), (1, 512), (8, 128))
# [notes, columns at a time] of a program of `pack_scan_kernel`, for larger batches: the first that is as wide as a row.
SCAN_TILES = ((16, 32), (4, 128), (1, 512), (1, 1024))
SCAN_HEAD = 8  # int64s of its state before the word of each program
SCAN_ABSENT = ("out_ids_ptr", "out_types_ptr", "positions_ptr")  # for `pack`
POSITION_BLOCK = 512
# With all registers that they want, packing and an embedding without LayerNorm spill nothing.
SUM_REGISTERS = 128
PACK_REGISTERS = 255
# More than the notes that a bucket of graphs with such a tile has room for.
PACK_INTO_NOTES = 64
ACTIVATIONS = ("gelu", "gelu_tanh")
GATES = ("gelu", "silu")
# ModernBERT's, of 128 tokens in all.
WINDOW = 64
# What plain attention goes without; a bias comes with places where the engine asks for it.
NO_BIAS = ("bias_ptr", "q_places_ptr", "k_places_ptr")


class Kernel(NamedTuple):
    """Arguments as `name:kind`, kinds being P (pointer that is 16-byte aligned), p (any pointer), D (32-bit integer
    that 16 divides), i (any), f (fp32), T (descriptor of a matrix for the copy engine)."""

    module: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[str, ...]
    matrix: bool = False  # whether its work is products, for which the chip has instructions

    @classmethod
    def of(cls, module: str, arguments: str, constants: str, matrix: bool = False) -> Kernel:
        pairs = tuple((name, kind) for name, _, kind in (word.partition(":") for word in arguments.split()))
        return cls(module, pairs, tuple(constants.split()), matrix)


KERNELS = {
    "layer_norm_kernel": Kernel.of(
        "layer_norm",
        "x_ptr:P residual_ptr:P bias_ptr:P weight_ptr:P shift_ptr:P out_ptr:P rows:i hidden:D x_row:D residual_row:D "
        "out_row:D eps:f",
        "ROWS BLOCK",
    ),
    "embedding_kernel": Kernel.of(
        "embedding",
        "ids_ptr:p types_ptr:p indices_ptr:p positions_ptr:p word_ptr:P position_ptr:P type_ptr:P weight_ptr:P "
        "shift_ptr:P out_ptr:P bad_ptr:p tokens:i batch:i seqlen:i hidden:D vocab_size:i max_positions:i "
        "type_vocab_size:i position_offset:i has_types:i has_positions:i ids_row:i ids_column:i types_row:i "
        "types_column:i word_row:D position_row:D type_row:D eps:f",
        "ROWS BLOCK",
    ),
    "gelu_kernel": Kernel.of(
        "gelu", "x_ptr:P bias_ptr:P out_ptr:P rows:i hidden:D x_row:D out_row:D", "ACTIVATION ROWS BLOCK"
    ),
    "quantise_kernel": Kernel.of(
        "quantise",
        "x_ptr:P residual_ptr:P weight_ptr:P shift_ptr:P y_ptr:P values_ptr:P scale_ptr:p hidden:D x_row:D "
        "residual_row:D eps:f",
        "NORM ACTIVATION BLOCK",
    ),
    "gate_kernel": Kernel.of("gate", "x_ptr:P out_ptr:P rows:i outputs:D x_row:D out_row:D", "ACTIVATION ROWS BLOCK"),
    "rotate_kernel": Kernel.of(
        "rotate",
        "x_ptr:P cos_ptr:P sin_ptr:P cu_seqlens_ptr:p places_ptr:p tokens:i batch:i positions:i heads:i x_token:D "
        "x_head:D steps:i",
        "HALF BLOCK ROWS HEADS",
    ),
    "pooling_kernel": Kernel.of(
        "pooling", "x_ptr:P cu_seqlens_ptr:p out_ptr:P tokens:i hidden:D x_row:D", "KIND ROWS BLOCK"
    ),
    "pack_kernel": Kernel.of(
        "packing",
        "ids_ptr:p mask_ptr:p types_ptr:p cu_seqlens_ptr:p indices_ptr:p seqused_ptr:p facts_ptr:p batch:i seqlen:i "
        "vocab_size:i type_vocab_size:i has_mask:i has_types:i keep_padding:i ids_row:i ids_column:i mask_row:i "
        "mask_column:i types_row:i types_column:i",
        "BLOCK_B BLOCK_S",
    ),
    "pack_into_kernel": Kernel.of(
        "packing_buffers",
        "ids_ptr:p mask_ptr:p types_ptr:p out_ids_ptr:p out_types_ptr:p positions_ptr:p indices_ptr:p cu_seqlens_ptr:p "
        "seqused_ptr:p facts_ptr:p batch:i seqlen:i rows:i notes:i vocab_size:i type_vocab_size:i position_offset:i "
        "padding_idx:i has_mask:i has_types:i keep_padding:i counts_positions:i ids_row:i ids_column:i mask_row:i "
        "mask_column:i types_row:i types_column:i",
        "BLOCK_B BLOCK_S BLOCK_N",
    ),
    "pack_scan_kernel": Kernel.of(
        "packing_scan",
        "ids_ptr:p mask_ptr:p types_ptr:p out_ids_ptr:p out_types_ptr:p positions_ptr:p indices_ptr:p cu_seqlens_ptr:p "
        "seqused_ptr:p facts_ptr:p state_ptr:p batch:i seqlen:i rows:i notes:i vocab_size:i type_vocab_size:i "
        "position_offset:i padding_idx:i has_mask:i has_types:i keep_padding:i counts_positions:i ids_row:i "
        "ids_column:i mask_row:i mask_column:i types_row:i types_column:i",
        "BLOCK_B BLOCK_S",
    ),
    "position_ids_kernel": Kernel.of(
        "packing", "ids_ptr:p out_ptr:p seqlen:i padding_idx:i ids_row:i ids_column:i", "BLOCK"
    ),
    "unpack_kernel": Kernel.of(
        "packing",
        "packed_ptr:P indices_ptr:p out_ptr:P tokens:i positions:i hidden:D packed_row:D steps:i",
        "ROWS BLOCK",
    ),
    "scatter_rows_kernel": Kernel.of(
        "packing", "packed_ptr:P indices_ptr:p out_ptr:P tokens:i positions:i hidden:D packed_row:D", "ROWS BLOCK"
    ),
    "tiles_kernel": Kernel.of(
        "attention",
        "cu_seqlens_q_ptr:p cu_seqlens_k_ptr:p seqused_ptr:p tiles_ptr:p batch:i q_tokens:i k_tokens:i has_used:i "
        "block_m:i bound:i",
        "NOTES OTHERS",
    ),
    "attention_kernel": Kernel.of(
        "attention",
        "q_ptr:P k_ptr:P v_ptr:P out_ptr:P tiles_ptr:p bias_ptr:p q_places_ptr:p k_places_ptr:p bound:i "
        "q_token:D q_head:D k_token:D k_head:D v_token:D v_head:D out_token:D out_head:D bias_reach:i qk_scale:f",
        "HEAD_DIM BLOCK_D BLOCK_M BLOCK_N HEADS WINDOW PRECISION",
        matrix=True,
    ),
    "attention_disentangled_kernel": Kernel.of(
        "attention_disentangled",
        "q_ptr:P k_ptr:P v_ptr:P out_ptr:P tiles_ptr:p position_keys_ptr:P position_queries_ptr:P buckets_ptr:p "
        "q_places_ptr:p k_places_ptr:p bound:i q_token:D q_head:D k_token:D k_head:D v_token:D v_head:D out_token:D "
        "out_head:D table_rows:i reach:i qk_scale:f",
        "HEAD_DIM BLOCK_D BLOCK_M BLOCK_N BLOCK_R PRECISION",
        matrix=True,
    ),
    "linear_kernel": Kernel.of(
        "linear",
        "x_ptr:P w_ptr:P bias_ptr:P residual_ptr:P out_ptr:P m:i n:D k:D x_row:D w_row:D residual_row:D out_row:D",
        "ACTIVATION BLOCK_M BLOCK_N BLOCK_K GROUP_M EVEN_K PRECISION",
        matrix=True,
    ),
    "linear_tma_kernel": Kernel.of(
        "linear",
        "x_desc:T w_desc:T bias_ptr:P residual_ptr:P out_desc:T m:i n:D k:D residual_row:D",
        "ACTIVATION BLOCK_M BLOCK_N BLOCK_K GROUP_M PRECISION",
        matrix=True,
    ),
}


def sources() -> str:
    """A digest of the kernels' source: cubins of other sources are not launched."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


class Variant(NamedTuple):
    """`types`: of each argument, `"bf16"` and so on (a pointer's element), `"-"` where None is passed."""

    kernel: str
    types: tuple[str, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    registers: int = 0  # the most a thread may take; 0 for no bound

    @property
    def key(self) -> str:
        values = ",".join(map(str, self.constants))
        bound = f"x{self.registers}" if self.registers else ""
        return f"{self.kernel}({','.join(self.types)})[{values}] {self.num_warps}x{self.num_stages}{bound}"


def make(
    kernel: str,
    pointers: dict[str, str],
    constants: Sequence[Any],
    num_warps: int = 4,
    num_stages: int = 2,
    floats: str = "bf16",
    absent: tuple[str, ...] = (),
    registers: int = 0,
) -> Variant:
    """A variant by the element types of its pointers; those that are not named are of type `floats`."""
    types = []
    for name, kind in KERNELS[kernel].arguments:
        if name in absent:
            types.append("-")
        elif kind in "Di":
            types.append("i32")
        else:
            types.append("fp32" if kind == "f" else pointers.get(name, floats))
    return Variant(kernel, tuple(types), tuple(constants), num_warps, num_stages, registers)


NORM = {"weight_ptr": "fp32", "shift_ptr": "fp32", "bias_ptr": "fp32"}
IDS = {name: "i64" for name in ("ids_ptr", "types_ptr", "facts_ptr", "state_ptr")}
INTEGERS = dict.fromkeys(
    ("indices_ptr", "positions_ptr", "cu_seqlens_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "seqused_ptr", "bad_ptr",
     "tiles_ptr", "out_ptr", "out_ids_ptr", "out_types_ptr"), "i32",
)  # fmt: skip
ROTATION = {"cos_ptr": "fp32", "sin_ptr": "fp32", "cu_seqlens_ptr": "i32", "places_ptr": "i32"}
BIASED = {"tiles_ptr": "i32", "bias_ptr": "fp32", "q_places_ptr": "i32", "k_places_ptr": "i32"}


def shipped(of_class: int) -> list[Variant]:
    """What the package holds for a device class: the tuning table's tiles, for encoders as they are usually built."""
    found = [*_rowwise(of_class), *_quantise(of_class), *_packing(), *_attention(of_class), *_linear(of_class)]
    return list(dict.fromkeys(found))


def _rowwise(of_class: int) -> Iterator[Variant]:
    for floats in FLOATS:
        for width in HIDDEN_WIDTHS:
            rows, warps = configs.rows(of_class, width)
            tile = (rows, width)
            yield make("layer_norm_kernel", NORM, tile, warps, floats=floats, absent=("residual_ptr", "bias_ptr"))
            yield make("layer_norm_kernel", NORM, tile, warps, floats=floats, absent=("bias_ptr",))
            pointers = NORM | IDS | {"indices_ptr": "i32", "positions_ptr": "i32"}
            for absent in (("bad_ptr",), ("bad_ptr", "weight_ptr", "shift_ptr")):
                bound = SUM_REGISTERS if "weight_ptr" in absent else 0
                yield make("embedding_kernel", pointers, tile, warps, floats=floats, absent=absent, registers=bound)
        for kind in ("first_token", "mean", "max"):
            yield make("pooling_kernel", {"cu_seqlens_ptr": "i32"}, (kind, 16, 128), floats=floats)
        for kernel in ("unpack_kernel", "scatter_rows_kernel"):
            for out in dict.fromkeys((floats, "fp32")):
                yield make(kernel, {"indices_ptr": "i32", "out_ptr": out}, (8, 256), floats=floats)
        for activation in ACTIVATIONS:
            for bias in ((), ("bias_ptr",)):
                yield make("gelu_kernel", NORM, (activation, 4, 512), floats=floats, absent=bias)
        for activation in GATES:
            yield make("gate_kernel", {}, (activation, 4, 512), floats=floats)
        for half in (16, 32, 64):
            yield make("rotate_kernel", ROTATION, (half, half, 4, 4), floats=floats, absent=("places_ptr",))


def _quantise(of_class: int) -> Iterator[Variant]:
    """Of fp8, which multiplies from 9.0 on, with the rest in bf16: norms' rows, contexts, and GELU's inner rows."""
    if of_class < FP8_CLASS:
        return
    for width in HIDDEN_WIDTHS:
        for absent in ((), ("residual_ptr",)):
            yield quantise_variant(width, "none", absent)
        yield quantise_variant(width, "none", NO_NORM)
    for width in INNER_WIDTHS:
        for activation in ACTIVATIONS:
            yield quantise_variant(width, activation, NO_NORM)


def quantise_variant(width: int, activation: str, absent: tuple[str, ...]) -> Variant:
    pointers = NORM | {"values_ptr": "fp8e4nv", "scale_ptr": "fp32"}
    constants = (absent != NO_NORM, activation, width)
    return make("quantise_kernel", pointers, constants, quantise_warps(width), absent=absent)


def quantise_warps(width: int) -> int:
    return 8 if width >= 2048 else 4


def _packing() -> Iterator[Variant]:
    for mask in ("i64", "i1"):
        pointers = INTEGERS | IDS | {"mask_ptr": mask}
        for tile in PACK_TILES:
            for kernel, constants in (("pack_kernel", tile), ("pack_into_kernel", (*tile, PACK_INTO_NOTES))):
                yield make(kernel, pointers, constants, registers=PACK_REGISTERS)
        for tile in SCAN_TILES:
            for missing in (SCAN_ABSENT, ()):
                yield make("pack_scan_kernel", pointers, tile, absent=missing, registers=PACK_REGISTERS)
    yield make("position_ids_kernel", INTEGERS | IDS, (POSITION_BLOCK,))
    yield make("tiles_kernel", INTEGERS, (32, 128))


def _attention(of_class: int) -> Iterator[Variant]:
    for floats in ("bf16", "fp16"):
        for head_dim in (32, 64, 128):
            for kind, heads in (("long", 1), ("short", 1), ("short", 4), ("few", 1), ("few", 4)):
                m, n, warps, stages, registers = configs.attention(of_class, 2, head_dim, kind)
                constants = (head_dim, head_dim, m, n, heads, -1, "ieee")
                yield make("attention_kernel", BIASED, constants, warps, stages, floats, NO_BIAS, registers)
                if head_dim == 64 and heads == 1 and kind != "short":
                    tiles = configs.attention(of_class, 2, 64, "few" if kind == "few" else "biased")
                    for found, absent, window in ((tiles, NO_BIAS, WINDOW), (configs.biased(tiles, 2, 64), (), -1)):
                        m, n, warps, stages, registers = found
                        constants = (head_dim, head_dim, m, n, heads, window, "ieee")
                        yield make("attention_kernel", BIASED, constants, warps, stages, floats, absent, registers)
        yield disentangled_variant(64, floats)


def disentangled_variant(head_dim: int, floats: str, absent: tuple[str, ...] = ()) -> Variant:
    (m, n, warps, stages, _), r = configs.disentangled(4 if floats == "fp32" else 2, head_dim)
    pointers = BIASED | {"buckets_ptr": "i32"}
    constants = (head_dim, head_dim, m, n, r, "ieee")
    return make("attention_disentangled_kernel", pointers, constants, warps, stages, floats, absent)


def _linear(of_class: int) -> Iterator[Variant]:
    sizes = [tuple(map(int, shape.split(" x "))) for shape in configs.table(of_class)["linear"] if " x " in shape]
    for in_features, out_features in sizes:
        for rows in (1, 1024, 1 << 20):
            tiles = configs.linear(of_class, 2, in_features, out_features, rows)
            for floats in ("bf16", "fp16"):
                for activation in ACTIVATIONS:
                    if configs.fuses(of_class, 2, in_features, out_features, activation):
                        yield linear_variant(tiles, activation, floats)


def linear_variant(tiles: configs.Linear, activation: str, floats: str, even_k: bool = True) -> Variant:
    m, n, k, group, warps, stages, tma, registers = tiles
    if tma:
        kernel, constants = "linear_tma_kernel", (activation, m, n, k, group, "ieee")
    else:
        kernel, constants = "linear_kernel", (activation, m, n, k, group, even_k, "ieee")  # type: ignore[assignment]
    return make(kernel, NORM, constants, warps, stages, floats, ("residual_ptr",), registers)


def tabled(of_class: int) -> list[Variant]:
    """What the tuning table can lead to beyond the shipped variants: other dtypes, head dimensions and epilogues."""
    found = []
    for floats, itemsize in (("bf16", 2), ("fp32", 4)):
        for head_dim in (16, 32, 64, 128, 256):
            for kind, absent, window in (
                ("long", NO_BIAS, -1), ("short", NO_BIAS, -1), ("few", NO_BIAS, -1), ("few", NO_BIAS, WINDOW),
                ("few", (), -1), ("biased", NO_BIAS, WINDOW), ("biased", (), -1),
            ):  # fmt: skip
                attention = configs.attention(of_class, itemsize, head_dim, kind)
                if not absent:
                    attention = configs.biased(attention, itemsize, head_dim)
                m, n, warps, stages, registers = attention
                constants = (head_dim, head_dim, m, n, 1, window, "ieee")
                found.append(make("attention_kernel", BIASED, constants, warps, stages, floats, absent, registers))
    for rows in (1, 1024, 1 << 20):
        tiles = configs.linear(of_class, 2, 768, 3072, rows)
        for even_k in (True, False):
            found.append(linear_variant(tiles._replace(tma=False), "gelu", "bf16", even_k))
        for activation in ("none", "relu", "tanh"):
            found.append(linear_variant(tiles, activation, "bf16"))
        with_residual = list(linear_variant(tiles, "none", "bf16").types)
        names = [name for name, _ in KERNELS["linear_tma_kernel" if tiles.tma else "linear_kernel"].arguments]
        with_residual[names.index("residual_ptr")] = "bf16"
        found.append(linear_variant(tiles, "none", "bf16")._replace(types=tuple(with_residual)))
    found.append(linear_variant(configs.linear(of_class, 4, 768, 3072, 1), "gelu", "fp32"))
    for width in (2048, 4096, 8192):
        lines, warps = configs.rows(of_class, width)
        found.append(make("layer_norm_kernel", NORM, (lines, width), warps))
    for head_dim, floats in ((32, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp32")):
        found.append(disentangled_variant(head_dim, floats))
    found.append(disentangled_variant(64, "bf16", ("position_queries_ptr",)))
    found.append(disentangled_variant(64, "bf16", ("position_keys_ptr",)))
    known = set(shipped(of_class))
    return [variant for variant in dict.fromkeys(found) if variant not in known]
