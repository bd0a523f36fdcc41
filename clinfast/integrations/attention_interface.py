"""`attn_implementation="clinfast"`: any model on transformers' attention interface gets the packed attention.

Takes effect on transformers 5, once clinfast was imported. Served is softmax attention over all keys or over those that
a padding mask leaves, in fp32 and bf16 on the CPU, without gradients. Every other call is computed by transformers' own
`sdpa` functions, counted by reason in `calls` and warned about once a reason. The results are those of `sdpa` at every
position, padding included. What neither computes raises.
"""

from __future__ import annotations

import collections
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clinfast.backends import cpu
from clinfast.backends.cpu.attention import MAX_HEAD_DIM
from clinfast.engine.concurrency import ForkSafeLock, single_thread_if_forked
from clinfast.integrations import attention_requests, key_mask
from clinfast.integrations.attention_requests import NAME
from clinfast.integrations.import_hook import when_imported
from clinfast.ops.attention import attention
from clinfast.ops.registry import KERNEL_DTYPES
from clinfast.reason import Reason, warn

PACKED = "packed"
OLDEST = 5  # before, most encoders did not ask the interface for their attention

# sdpa ignores these, or they are in its mask already; any other argument that is set goes to sdpa.
_IGNORED = {
    *("cache_position", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "num_items_in_batch"),
    *("output_hidden_states", "position_embeddings", "position_ids", "return_dict", "sliding_window", "use_cache"),
}
# These change the scores, and sdpa does not know them.
_REFUSED = ("block_indices", "indices", "s_aux", "sinks", "softcap")

calls: collections.Counter[str] = collections.Counter()
"""Attention calls: `"packed"`, or sdpa with the reason; a traced call counts once, when it is traced."""

_lock = ForkSafeLock()
_sdpa: Callable[..., Any]
_sdpa_mask: Callable[..., Any]
_bidirectional: Any = None
_registered_with: str | None = None

TRACED = Reason("the model is being traced or compiled")
SWITCHED_OFF = Reason("CLINFAST_DISABLE is set", quiet=True)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in each layer.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: [B, heads, Q, head_dim].
        key, value: [B, heads, K, head_dim]; with fewer heads (grouped queries) sdpa computes.
        attention_mask: None, or a mask that sdpa takes.
        dropout, scaling, is_causal, kwargs: as sdpa takes them.

    Returns:
        [B, Q, heads, head_dim], and None for the attention weights.

    Raises:
        ValueError: an argument that changes the scores and that sdpa does not know (softcap, sinks, chosen keys).
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation='clinfast' does not compute {name}, which {type(module).__name__} needs; "
                "call model.set_attn_implementation('eager')"
            )
    if torch.compiler.is_compiling():
        _count_traced()
    else:
        reason = _why_sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
        _count(reason)
        if reason is None:
            return _packed(query, key, value, attention_mask, scaling), None
    found: tuple[Tensor, Tensor | None] = _sdpa(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return found


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """What transformers calls once a forward: sdpa's mask, or an equal one that `key_mask` understands."""
    if not args and not torch.compiler.is_compiling() and _says_keys_only(kwargs):
        rows = kwargs["attention_mask"]
        if kwargs.get("allow_is_bidirectional_skip") and bool(rows.all()):
            return None
        return key_mask.make(rows, _query_length(kwargs))
    mask: Tensor | None = _sdpa_mask(*args, **kwargs)
    return mask


def _says_keys_only(kwargs: dict[str, Any]) -> bool:
    """Whether the mask asked for is `attention_mask` [B, K] alone, the same for every query."""
    rows, keys, queries = kwargs.get("attention_mask"), kwargs.get("kv_length"), _query_length(kwargs)
    if type(rows) is not Tensor or not rows.is_cpu or rows.dtype is not torch.bool or _is_transformed():
        return False
    if type(keys) is not int or type(queries) is not int or rows.shape != (kwargs.get("batch_size"), keys):
        return False
    if rows.numel() == 0 or queries == 0 or kwargs.get("use_vmap") or kwargs.get("allow_is_causal_skip", True):
        return False
    if not all(type(offset) is int and offset == 0 for offset in map(kwargs.get, ("kv_offset", "q_offset"), (0, 0))):
        return False
    window = kwargs.get("local_size")
    if window is None:
        return kwargs.get("mask_function") is _bidirectional
    # With this permission, the window alone sets it apart from a bidirectional mask; here it reaches every key.
    return kwargs.get("allow_is_bidirectional_skip") is True and queries <= keys < window


def _query_length(kwargs: dict[str, Any]) -> Any:
    cache_position = kwargs.get("cache_position")  # how the first 5.x say it
    return kwargs.get("q_length") if cache_position is None else cache_position.shape[0]


def _is_transformed() -> bool:
    """Whether someone looks on who must see plain PyTorch: jit tracing, functorch, dispatch modes, forward-mode AD."""
    return bool(
        torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _why_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> Reason | None:
    if os.environ.get("CLINFAST_DISABLE", "0") not in ("0", ""):
        return SWITCHED_OFF
    if _is_transformed() or not type(query) is type(key) is type(value) is Tensor:
        return TRACED
    if dropout:
        return Reason("dropout is on", "call model.eval() for inference")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return Reason("gradients are recorded", "call the model under torch.inference_mode()")
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        return Reason("the model is not on the CPU")
    if cpu.unavailable() is not None and not os.environ.get("CLINFAST_BACKEND_ATTENTION"):
        return Reason("the compiled kernels are not there", "clinfast.info() says why")
    dtype = query.dtype
    if dtype not in KERNEL_DTYPES["cpu"] or key.dtype is not dtype or value.dtype is not dtype:
        return Reason("the dtype is not served", "float32 and bfloat16 are")
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not dtype:
        return Reason("autocast asks for another dtype")
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _IGNORED:
            return Reason(f"the argument {name} is given")
    shape, key_shape = query.shape, key.shape
    batch, heads, queries, head_dim = shape
    if getattr(module, "num_key_value_groups", 1) != 1 or key_shape[1] != heads:
        return Reason("queries share keys in groups")
    if key_shape != value.shape or key_shape[0] != batch or key_shape[3] != head_dim or head_dim > MAX_HEAD_DIM:
        return Reason("the shapes are not served")
    if queries == 1:
        return Reason("there is one query a note, as in cached generation")
    if not query.numel() or not key.numel() or batch * max(queries, key_shape[2]) >= 2**31:
        return Reason("the shapes are not served")
    if scaling is not None and not isinstance(scaling, (float, int)):
        return Reason("scaling is not a number")
    if mask is None:
        return Reason("the attention is causal") if _causal(module, is_causal) else None
    if type(mask) is not Tensor or mask.dtype is not torch.bool:
        return Reason("the mask is not a boolean tensor")
    if not mask.is_cpu or not key_mask.is_key_mask(mask, batch, queries, key_shape[2]):
        return Reason("the mask is not the same for every query")
    return None


def _causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    return bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))


def _packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    single_thread_if_forked()
    batch, heads, queries, head_dim = query.shape
    if mask is None:
        keys = key_mask.all_keys(batch, queries, key.shape[2])
    else:
        keys = key_mask.keys_of(mask, batch, queries, key.shape[2])
    q, k, v = _rows(query), _rows(key), _rows(value)
    if keys.indices is not None:
        k, v = k[keys.indices], v[keys.indices]
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    out = attention(q, k, v, keys.cu_seqlens_q, keys.cu_seqlens_k, keys.seqused_k, scale)
    return out.view(batch, queries, heads, head_dim)


def _rows(x: Tensor) -> Tensor:
    """[B, heads, S, D] as [B * S, heads, D]: a view where a model splits heads off a [B, S, hidden] tensor."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _count(reason: Reason | None) -> None:
    label = PACKED if reason is None else f"sdpa: {reason}"
    with _lock:
        calls[label] += 1
        first = calls[label] == 1
    if first and reason is not None and not reason.quiet:
        advice = f": {reason.advice}" if reason.advice else ""
        warn(f"attn_implementation='clinfast' computes with sdpa, because {reason}{advice}")


def _count_traced() -> None:
    _count(TRACED)


# Dynamo then runs it while tracing, and neither traces it nor breaks the graph. What
# torch.compiler.assume_constant_result does; that one imports Dynamo.
_count_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register(modeling_utils: Any = None) -> None:
    """Make `"clinfast"` known to transformers. `import clinfast` does it; again only after a reload of transformers.

    On transformers before 5 it only sees to it that asking for the name says so.
    """
    global _sdpa, _sdpa_mask, _bidirectional, _registered_with
    import transformers

    if modeling_utils is None:
        modeling_utils = importlib.import_module("transformers.modeling_utils")
    version = transformers.__version__
    takes_effect = int(version.partition(".")[0]) >= OLDEST
    if takes_effect:
        from transformers import masking_utils
        from transformers.integrations import sdpa_attention

        _sdpa, _sdpa_mask = sdpa_attention.sdpa_attention_forward, masking_utils.sdpa_mask
        _bidirectional = masking_utils.bidirectional_mask_function
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_function)
        modeling_utils.ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
        _registered_with = version
    attention_requests.check(modeling_utils.PreTrainedModel, None if takes_effect else version)


def _register_or_warn(modeling_utils: ModuleType) -> None:
    try:
        register(modeling_utils)
    except Exception as error:  # importing transformers must not fail over this
        warn(f"attn_implementation='clinfast' is not to be had: {type(error).__name__}: {error}")


def install() -> None:
    """Register as soon as transformers' models are imported."""
    when_imported("transformers.modeling_utils", _register_or_warn)


def describe() -> str:
    """One line for `clinfast.info()`."""
    if _registered_with is None:
        return "not registered: transformers was not imported, or is older than 5"
    counts = ", ".join(f"{count} {label}" for label, count in sorted(calls.items()))
    return f"attn_implementation='clinfast' is registered; {counts or 'not called yet'}"
