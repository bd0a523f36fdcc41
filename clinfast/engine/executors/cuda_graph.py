"""Runs the encoder as a CUDA graph: one launch for all of its kernels.

A call packs its notes into a lane's buffers, replays the graph of the smallest bucket that holds them, and unpacks
what is the caller's; rows that nobody asked for belong to a note without keys. While the device works, the host looks
whether the model or its weights changed, and reads what packing reported: a result that should not stand is thrown
away.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clinfast.engine import packing
from clinfast.engine.buckets import Bucket, bucket
from clinfast.engine.executors.eager import EagerExecutor
from clinfast.engine.graph_pool import Captured, Driver, GraphPool, Lane
from clinfast.engine.packing import PackedBatch, check_facts, offsets_of
from clinfast.engine.run import compute, no_tokens, spread
from clinfast.engine.spec import EncoderOutput, HeadSpec, NotServed, Request
from clinfast.engine.weights import PackedWeights
from clinfast.ops import registry
from clinfast.ops.packing import PackedBuffers, PackInto

log = logging.getLogger("clinfast")
# Up to so many positions, padding is cheaper to compute than its share is to ask for.
UNASKED_POSITIONS = 256
# Sizes of batches whose buckets are remembered.
MAX_KEYS = 4096
# A capture forbids others on the device to be begun, not work.
_capturing = threading.Lock()


class GraphExecutor:
    """Calls of one encoder through graphs; `run` gives None where the call has to run op by op.

    Attributes:
        op_by_op: calls that did, by reason.
    """

    def __init__(self, executor: EagerExecutor, head: HeadSpec, padding: str, driver: Driver, **limits: Any) -> None:
        self.executor, self.head, self.padding = executor, head, padding
        self.pool = GraphPool(driver, **limits)
        spec = executor.spec
        self.constants = PackInto(
            spec.vocab_size, spec.type_vocab_size, spec.position_offset, spec.position_padding_idx, padding == "keep"
        )
        self._pack_into = registry.implementation("pack.into", executor.backend, executor.device)
        self.op_by_op: dict[str, int] = {}
        self._keys: dict[tuple[int, int], Bucket | None] = {}

    def _bucket(self, tokens: int, batch: int) -> Bucket | None:
        """`bucket`, remembered."""
        try:
            return self._keys[tokens, batch]
        except KeyError:
            if len(self._keys) >= MAX_KEYS:
                self._keys.clear()
            key = self._keys[tokens, batch] = bucket(tokens, batch)
            return key

    def run(
        self,
        weights: PackedWeights,
        request: Request,
        dtype: torch.dtype,
        settle: Callable[[], bool],
        *,
        asked: bool = False,
    ) -> EncoderOutput | None:
        """Padded results in `dtype`.

        Args:
            settle: called while the device works; False where the weights are stale, so that the result is None.
            asked: by `warmup`: capture, whatever was evicted.

        Raises:
            As `engine.run.run`; and whatever `settle` raises.
        """
        if self.pool.off is not None:
            return None
        ids, mask, types = request[:3]
        if self._uses_columns(request) and self.padding == "keep":
            self._without("padding is kept, under attention that depends on distances")
            return None
        batch, seqlen = ids.shape
        positions = batch * seqlen
        if batch == 1 or positions <= UNASKED_POSITIONS or mask is None or self.padding == "keep":
            key = self._bucket(positions, batch)
        else:
            if bucket(1, batch) is None:
                self._without("a batch beyond the largest graph")
                return None
            tokens = self._tokens(request, settle)
            if not tokens:
                return None
            key = self._bucket(tokens, batch)
        if key is None:
            self._without("a batch beyond the largest graph")
            return None
        with self.pool.driver.on():
            lane, captured = self.pool.acquire(key, ids.device, weights)
            if lane is None:
                self._without(self.pool.off or "all lanes of graphs were in use")
                return None
            try:
                # Before a capture too, whose rehearsal is to meet boundaries that fit.
                self._pack_into(ids, mask, types, self.constants, key.rows, key.notes, lane.buffers)
                if captured is None:
                    captured = self._capture(lane, key, weights, asked)
                    if captured is None:
                        return None
                lane.packed.record()
                captured.graph.replay()
                self.pool.replays += 1
                return self._finish(lane, captured, weights, request, dtype, settle)
            finally:
                self.pool.release(lane)

    def _uses_columns(self, request: Request) -> bool:
        """Whether distances count that need not be those of ranks; a graph knows ranks only."""
        return self.executor.spec.uses_places and request.attention_mask is not None

    def _tokens(self, request: Request, settle: Callable[[], bool]) -> int:
        """How many tokens are real, which waits for the device; 0 where the weights are stale, or there are none."""
        try:
            packed = packing.pack(
                request, self.executor.spec, self.executor.pack, keep_padding=False,
                first_token=self.head.reads_first_token,
            )  # fmt: skip
        except (IndexError, NotServed):
            if not settle():
                return 0
            raise
        return packed.tokens

    def _finish(
        self, lane: Lane, captured: Captured, weights: PackedWeights, request: Request, dtype: torch.dtype,
        settle: Callable[[], bool],
    ) -> EncoderOutput | None:  # fmt: skip
        if not settle():
            return None
        facts = self.pool.driver.fetch(lane.buffers.facts, lane.facts, lane.packed)
        tokens, longest = check_facts(
            facts, request, self.executor.spec, first_token=self.head.reads_first_token
        )
        batch, seqlen = request.input_ids.shape
        buffers = lane.buffers
        real = PackedBatch(
            buffers.cu_seqlens[: batch + 1], buffers.indices[:tokens], None, tokens, longest, batch, seqlen
        )
        if self._uses_columns(request) and tokens and offsets_of(real) is not None:
            self._without("a mask with holes, under attention that depends on distances")
            return None
        if not tokens:
            return no_tokens(self.executor.spec.hidden_size, self.head, real, request, dtype)
        rows = batch if self.head.only_first_tokens else tokens
        packed = captured.output._replace(
            hidden_states=captured.output.hidden_states[:rows],
            branches=tuple(
                None if y is None else y[: tokens if branch.rows == "per_token" else batch]
                for branch, y in zip(self.head.branches, captured.output.branches, strict=True)
            ),
        )
        return spread(self.executor, weights, self.head, request, real, packed, dtype, copy=True)

    def _capture(self, lane: Lane, key: Bucket, weights: PackedWeights, asked: bool) -> Captured | None:
        if not self.pool.wants(key, asked=asked):
            self._without(self.pool.off or "a size that is seldom asked for, after graphs were evicted")
            return None

        def body() -> Any:
            return self._body(lane.buffers, key, weights)

        try:
            with _capturing, torch.inference_mode(False), torch.no_grad():
                captured = Captured(*self.pool.driver.capture(body, lane.pool))
        except torch.OutOfMemoryError:
            self._switch_off("the device ran out of memory while a graph was captured")
            return None
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._switch_off(f"a graph could not be captured: {first}")
            return None
        if self.pool.add(lane, key, captured):
            return captured
        self._without("a graph beyond the bound on memory")
        return None

    def _body(self, buffers: PackedBuffers, key: Bucket, weights: PackedWeights) -> Any:
        """The whole of a bucket. Views are made anew each time, since kernels keep what they prepared for one."""
        rows, notes = key
        ids, types, places = (x[:rows].view(1, rows) for x in buffers[:3])
        request = Request(ids, None, types if weights.token_type is not None else None)
        batch = PackedBatch(
            buffers.cu_seqlens[: notes + 2],
            torch.arange(rows, dtype=torch.int32, device=ids.device),
            buffers.seqused_k[: notes + 1],
            rows,
            rows,
            notes + 1,
            rows,
            places,
            buffers.indices[:rows],
        )
        output = compute(self.executor, weights, self.head, request, batch)
        if self.head.hidden_states or any(y is None for y in output.branches):
            return output
        # Nobody reads them after the graph, so that their memory is free for what follows in it.
        return output._replace(hidden_states=output.hidden_states.new_empty(0, output.hidden_states.shape[1]))

    def _switch_off(self, reason: str) -> None:
        if self.pool.switch_off(reason):
            log.warning("clinfast: CUDA graphs are off for this model, which runs op by op from now on: %s", reason)
        self._without(reason)

    def _without(self, reason: str) -> None:
        self.op_by_op[reason] = self.op_by_op.get(reason, 0) + 1

    def describe(self) -> dict[str, Any]:
        pool = self.pool
        return {
            "captured": pool.captures, "replays": pool.replays, "evicted": pool.evictions, "bytes": pool.nbytes,
            "off": pool.off, "op_by_op": dict(self.op_by_op),
        }  # fmt: skip


_nothing = contextlib.nullcontext()


class CudaDriver:
    """Graphs, streams and events of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = threading.local()

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """The device as the current one."""
        return torch.cuda.device(self.device) if torch.cuda.current_device() != self.device.index else _nothing

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, body: Callable[[], Any], pool: Any) -> tuple[Any, Any, int]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            body()  # kernels load, and libraries choose theirs
        side.synchronize()
        torch.cuda.empty_cache()  # which `torch.cuda.graph` may do too, and what it grew by would not show
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating and waiting meanwhile.
        with _own_workspaces(), torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            output = body()
        torch.cuda.current_stream(self.device).wait_stream(side)
        return graph, output, max(0, torch.cuda.memory_reserved(self.device) - before)

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index or 0)

    def event(self) -> Any:
        return torch.cuda.Event()

    def memory(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def fetch(self, source: Tensor, target: Tensor, ready: Any) -> list[int]:
        """`source` as of `ready`, beside the work that the current stream has got since."""
        with torch.cuda.stream(self._side_stream()):
            ready.wait()
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        copied.synchronize()
        found: list[int] = target.tolist()
        return found

    def _side_stream(self) -> Any:
        found = getattr(self._side, "stream", None)
        if found is None:
            found = self._side.stream = torch.cuda.Stream(self.device)
        return found


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS keeps a workspace a stream; one that is made inside the capture lies in the graph's own pool, where no
    other lane writes to it, and is not left for others afterwards."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()
