"""One optimized module's encoder: precision and backend, packed weights that are never stale, and `run`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch

from clinfast.engine import precision as precisions
from clinfast.engine import reproducibility
from clinfast.engine.concurrency import ForkSafeLock, gate, single_thread_if_forked
from clinfast.engine.executors import EagerExecutor, NativeExecutor
from clinfast.engine.executors.cuda_graph import CudaDriver, GraphExecutor
from clinfast.engine.run import run
from clinfast.engine.spec import EncoderOutput, Match, Request, Unsupported
from clinfast.engine.weights import Fingerprint, PackedWeights, pack_weights
from clinfast.ops import registry

# Types of device that models are optimized on.
SERVED = ("cpu", "cuda")


class Encoder:
    """Runs admitted calls of one module. Holds the sources of its weights, never the module itself."""

    def __init__(
        self,
        match: Match,
        *,
        precision: str = "auto",
        backend: str = "auto",
        padding: str = "remove",
        reproducible: bool | None = None,
    ) -> None:
        self.spec, self.head = match.encoder, match.head
        self.refs = [
            match.parameters[name] for name in self.spec.parameter_names() + self.head.parameter_names()
        ]
        if padding == "keep" and self.spec.disentangled is not None:
            raise Unsupported(
                f"padding='keep' is not served for {self.spec.family}, whose stock forward lets padded positions look "
                "at everything; pass padding='remove'"
            )
        first = self.refs[0].tensor()
        if first.device.type not in SERVED:
            raise Unsupported(f"the model is on {first.device}; models on {' and '.join(SERVED)} are served")
        self.model_dtype = first.dtype
        self.dtype = precisions.resolve(precision, first.dtype, first.device.type)
        self.precision, self.backend, self.padding = precision, backend, padding
        self.wants_same_bits = reproducible is True
        # What `clinfast::encode` must know besides tensors. It names the option, not the dtype that it now means.
        self.call = json.dumps(
            {
                "spec": self.spec.to_json(),
                "head": self.head.to_dict(),
                "precision": precision,
                "backend": backend,
                "padding": padding,
            }
        )
        self._executor = self._make_executor(first.device.type)
        self._lock = ForkSafeLock()
        self._packed: tuple[PackedWeights, Fingerprint] | None = None
        self.graphs: GraphExecutor | None = None
        self._graph_device: torch.device | None = None
        self.packs = 0
        self.pack()
        if reproducible and precision == "fp8":
            raise Unsupported("reproducible=True is not served in fp8; pass precision='bf16'")
        try:
            self.reproducible = reproducibility.proved(self.weights().linears(), first.device)
        except NotImplementedError as refusal:
            if not reproducible:
                raise
            raise Unsupported(f"{refusal}; pass reproducible=None to go on without that promise") from None
        if reproducible and not self.reproducible:
            raise Unsupported(
                "reproducible=True, but this machine's linears give a row other bits in another batch; pass "
                "reproducible=None to go on without that promise"
            )

    def pack(self) -> None:
        """Copy the live weights into the layout of the ops, whatever the cache holds."""
        with self._lock, torch.no_grad():
            self._packed = None
            self._pack_locked()

    def mark_dirty(self) -> None:
        """The next run packs anew."""
        self._packed = None

    def is_stale(self) -> str | None:
        packed = self._packed
        return "not packed since the last training or grad-mode call" if packed is None else packed[1].changed()

    def weights(self) -> PackedWeights:
        """The packed weights, packed anew if any source changed."""
        packed = self._packed
        if packed is not None and packed[1].changed() is None:
            return packed[0]
        with self._lock, torch.no_grad():
            packed = self._packed
            if packed is None or packed[1].changed() is not None:
                packed = self._packed = None  # the old copy goes before the new one is made
                packed = self._pack_locked()
            return packed[0]

    def _pack_locked(self) -> tuple[PackedWeights, Fingerprint]:
        # The fingerprint comes first: a write that lands while the copy is made is then seen at the next call.
        fingerprint = Fingerprint(self.refs)
        names = self.spec.parameter_names() + self.head.parameter_names()
        tensors = dict(zip(names, fingerprint.held, strict=True))
        first = fingerprint.held[0]
        self.model_dtype = first.dtype
        if first.device.type != self._executor.device:
            if first.device.type not in SERVED:
                raise Unsupported(f"the model was moved to {first.device}, where it runs stock")
            self._executor = self._make_executor(first.device.type)
        self.dtype = precisions.resolve(self.precision, first.dtype, first.device.type)
        if first.device != self._graph_device:
            self._graph_device, self.graphs = first.device, self._make_graphs(first.device)
        try:
            kind = self._kind(first.device.type)
            weights = pack_weights(self.spec, self.head, tensors, self.dtype, self.backend, kind)
        except ValueError as refusal:
            raise Unsupported(f"precision={self.precision!r} cannot be served: {refusal}") from None
        self._packed = (weights, fingerprint)
        self.packs += 1
        return self._packed

    def _kind(self, device: str) -> str:
        """Of the linears: see `ops.linear.prepack`."""
        if self.precision == "fp8":
            return "fp8"
        return "fixed" if self.wants_same_bits and device != "cpu" else ""

    def _make_executor(self, device: str) -> EagerExecutor:
        executor = NativeExecutor(self.spec, self.backend, device)
        kind = self._kind(device)
        if kind == "fp8" and (self.spec.gated or self.spec.uses_places):
            raise Unsupported(
                f"precision='fp8' is not served for {self.spec.family}, whose gate, rotation or window was not proved; "
                "pass precision='bf16'"
            )
        try:
            if kind == "fp8":
                executor.layer_norm = registry.implementation("layer_norm.fp8", self.backend, device)
            if kind == "fixed":
                executor.attention = registry.implementation("attention.fixed", self.backend, device)
                executor.first_token_attention = executor.attention
                if self.spec.relative_buckets:
                    name = "attention_biased.fixed"
                    executor.attention_biased = registry.implementation(name, self.backend, device)
                if self.spec.disentangled is not None:
                    name = "attention_disentangled.fixed"
                    executor.attention_disentangled = registry.implementation(name, self.backend, device)
                if self.spec.has_windows:
                    name = "attention_windowed.fixed"
                    executor.attention_windowed = registry.implementation(name, self.backend, device)
                registry.implementation("linear.prepack_fixed", self.backend, device)
        except RuntimeError:
            wanted = "precision='fp8'" if kind == "fp8" else "reproducible=True"
            instead = "backend='auto'" if kind == "fp8" else "reproducible=None to go on without that promise"
            raise Unsupported(
                f"{wanted} is not served by backend={self.backend!r} here: it takes the Triton kernels; pass {instead}"
            ) from None
        return executor

    def _make_graphs(self, device: torch.device) -> GraphExecutor | None:
        # PyTorch's own attention asks for the lengths, which a capture forbids.
        if device.type != "cuda" or self.backend == "torch" or os.environ.get("CLINFAST_CUDA_GRAPHS", "1") == "0":
            return None
        return GraphExecutor(self._executor, self.head, self.padding, CudaDriver(device))

    def run(
        self, request: Request, check: Callable[[], None] | None = None, *, asked: bool = False
    ) -> EncoderOutput:
        """Compute the request; padded results in the model's dtype.

        Args:
            check: raises where the model is no longer what was matched; on a GPU it is called while the device works.
            asked: capture a graph for this size (`warmup`).

        Raises:
            NotServed: the stock forward has to run, for a reason that only the values show.
            IndexError: an id or token type out of range.
        """
        single_thread_if_forked()
        graphs = self.graphs
        if graphs is not None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    found = self._run_graph(graphs, request, check, asked)
            else:
                found = self._run_graph(graphs, request, check, asked)
            if found is not None:
                return found
        with gate.room(self._executor.device), torch.no_grad():
            if check is not None:
                check()
            weights = self.weights()
            return run(self._executor, weights, self.head, request, self.padding, self.model_dtype)

    def _run_graph(
        self, graphs: GraphExecutor, request: Request, check: Callable[[], None] | None, asked: bool
    ) -> EncoderOutput | None:
        """Twice at most: a result of weights that were found stale is thrown away, and computed again."""
        for _ in range(2):
            packed = self._packed
            if packed is None or packed[0].word.device != request.input_ids.device:
                if check is not None:
                    check()
                self.weights()
                packed = self._packed
            if packed is None or self.graphs is not graphs:
                return None
            weights, fingerprint = packed

            def settle(packed: Any = packed, fingerprint: Fingerprint = fingerprint) -> bool:
                if check is not None:
                    check()
                return self._packed is packed and fingerprint.changed() is None

            found = graphs.run(weights, request, self.model_dtype, settle, asked=asked)
            if found is not None:
                return found
            if self._packed is packed and fingerprint.changed() is None:
                return None
            self.weights()
        return None

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype whose rounding bounds the error."""
        return precisions.E4M3 if self.precision == "fp8" else self.dtype

    @property
    def packed_bytes(self) -> int:
        packed = self._packed
        return 0 if packed is None else packed[0].nbytes

    def describe(self) -> dict[str, Any]:
        """Facts for the report."""
        packed = self._packed
        linears = sorted({linear.library for linear in packed[0].linears()}) if packed else []
        return {
            "family": self.spec.family,
            "head": self.head.name,
            "layers": self.spec.num_layers,
            "hidden_size": self.spec.hidden_size,
            "compute_dtype": "fp8, the rest in " * (self.precision == "fp8") + str(self.dtype).removeprefix("torch."),
            "model_dtype": str(self.model_dtype).removeprefix("torch."),
            "padding": self.padding,
            "linear": ", ".join(linears),
            "packed_bytes": self.packed_bytes,
            "packs": self.packs,
            "reproducible": self.reproducible,
            "graphs": None if self.graphs is None else self.graphs.describe(),
        }

