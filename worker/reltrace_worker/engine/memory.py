"""Whether jobs fit into memory: what they need, by the shapes of model and jobs, and what is free.

Weights take no gradient, and attention over a packed batch keeps nothing quadratic, so what a pass
allocates grows by the same amount with every token. The graph of a decoder layer keeps the query,
the key, the value and the output of attention, two factors of the gated product (three under
plain gradients), what plain norms save, and the residual stream. Without checkpointing the graphs
of all layers are kept, with it the input of every segment and the graph of one. One layer's
backward pass comes on top. What jobs ask for beyond (logits, further sites, targets, edits,
results) is added by its size.

A plan is needed beside the engine's fallback to smaller batches: running out of memory is harmless
on CUDA, but a CPU's memory is promised first and missing later, which takes the process down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reltrace_worker.engine.decoding import PROMPT_TOKENS
from reltrace_worker.engine.edits import MANY_CELLS
from reltrace_worker.engine.host_memory import GIB, free_device_bytes, free_host_bytes
from reltrace_worker.engine.kv_cache import ROOM
from reltrace_worker.engine.passes import graph_width, segment_length
from reltrace_worker.engine.sizes import result_bytes
from reltrace_worker.lrp import RULES, Rule
from reltrace_worker.lrp.attention import kernel_for
from reltrace_worker.lrp.ops import activation_name
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.models.rope import longrope_limit
from reltrace_worker.types.errors import EngineError
from reltrace_worker.types.jobs import GenerateJob, TraceJob

_HOST_READING_SECONDS = 0.5
"""How long a reading of host memory counts: it takes a good part of a short pass."""

_UNKNOWN_ACTIVATION = 3
"""Factors of the gated product's width that an activation made of plain operations keeps beside
its input: of those that transformers has, GELU by its formula ("gelu_new") keeps most, 2."""

_FLOAT32 = torch.float32.itemsize


def head_size(loaded: LoadedModel) -> int:
    config: Any = loaded.model.config
    return int(getattr(config, "head_dim", None) or loaded.shape.hidden_size // loaded.shape.heads)


class MemoryPlan:
    """Plans passes over one model; weights are not counted.

    `limit` are the bytes that a pass may use; None: what is free on CUDA, half of what is free now
    on a CPU, which others use too. Of a model that is divided among processes, the plan is for this
    one's part, and on a CPU for its share of the memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limit: int | None = None,
        rules: Mapping[str, Rule] = RULES,
    ) -> None:
        self._loaded = loaded
        self._rules = rules
        self._shape, self._here = loaded.shape, loaded.shape_here
        self._itemsize = loaded.dtype.itemsize
        self._config: Any = loaded.model.config
        self._on_cpu = loaded.device.type != "cuda"
        if limit is None and self._on_cpu:
            limit = free_host_bytes() // 2 // loaded.ranks.size
        self._limit = limit
        self._host_read_at, self._host_bytes = -math.inf, 0
        heads = getattr(self._config, "num_key_value_heads", None) or self._shape.heads
        self._query_width = self._here.heads * head_size(loaded)
        self._key_width = int(heads) * head_size(loaded)
        # Values per token that one layer's forward or backward pass holds for a moment.
        around = 2 * self._here.hidden_size + 4 * self._query_width
        self._backward_width = 3 * self._here.intermediate_size + around
        if self._on_cpu and self._itemsize < _FLOAT32:
            # Attention's tensors and their gradients in float32 (lrp/sdpa.py).
            attention = 4 * (self._query_width + self._key_width) * _FLOAT32 // self._itemsize
            self._backward_width = max(self._backward_width, attention + around)

    @property
    def available(self) -> int:
        """Bytes of the model's devices that a pass may use now."""
        free = self._free_on_host() if self._on_cpu else free_device_bytes((self._loaded.device,))
        return free if self._limit is None else min(free, self._limit)

    def tokens(self, rule: str, checkpointing: bool) -> int:
        """Return how many tokens fit into a pass that asks for no more than ``resid``."""
        return self.available // self.bytes_per_token(rule, checkpointing)

    def fits(
        self, jobs: Sequence[TraceJob], checkpointing: bool, *, try_anyway: bool = False
    ) -> bool:
        """Whether a pass over jobs may be tried; `try_anyway`: whatever it needs of a GPU."""
        if not self._on_cpu and self._result_bytes(jobs) > self._free_on_host():
            return False
        if try_anyway and not self._on_cpu:
            return True
        return self.trace_bytes(jobs, checkpointing) <= self.available

    def too_large(self, jobs: Sequence[TraceJob]) -> EngineError:
        """Return the error about a pass that does not fit even with checkpointing."""
        tokens = sum(len(job.token_ids) for job in jobs)
        what = "one prompt" if len(jobs) == 1 else f"a pass of {len(jobs)} prompts"
        what = f"{what} of {tokens} tokens does not fit into memory, even with checkpointing"
        results, host = self._result_bytes(jobs), self._free_on_host()
        if not self._on_cpu and results > host:
            return _too_large(f"{what}: its results lie in the host's", results, host)
        return _too_large(what, self.trace_bytes(jobs, checkpointing=True), self.available)

    def generation_fault(self, jobs: Sequence[GenerateJob], held: int = 0) -> EngineError | None:
        """Return why tokens can not be generated for jobs together; None: that may be tried.

        So many bytes are `held` for some of them already.
        """
        need = self.generation_bytes(jobs) - held
        if need <= self.available or (len(jobs) == 1 and not self._on_cpu):
            return None
        most = max(job.total_tokens for job in jobs)
        what = f"generating up to {most} tokens, prompts included, does not fit into memory"
        return _too_large(what, need, self.available)

    def atlas_fault(self, k: int, table_bytes: int) -> EngineError | None:
        """Return why the tables of an atlas do not fit; None: they do."""
        if table_bytes <= self.available:
            return None
        return _too_large(
            f"an atlas of {k} places does not fit into memory", table_bytes, self.available
        )

    def bytes_per_token(self, rule: str, checkpointing: bool) -> int:
        """Return the bytes of one more token in a pass by a rule that records ``resid``."""
        shape, family, found = self._here, self._loaded.family, self._rules[rule]
        # Of CUDA's kernels, the one for float32 takes no grouped heads: they are repeated.
        grouped = self._on_cpu or self._itemsize < _FLOAT32
        layer = 2 * self._query_width + 2 * (self._key_width if grouped else self._query_width)
        layer += found.mlp_tensors * shape.intermediate_size
        mlp = next(m for m in self._loaded.model.modules() if isinstance(m, family.gated_mlp))
        if activation_name(getattr(mlp, family.activation)) is None:
            layer += _UNKNOWN_ACTIVATION * shape.intermediate_size
        # The residual stream; of attention and of norms some numbers per head and row.
        layer += shape.hidden_size + 2 * shape.heads
        norms = 0
        if family.norm not in found.patches:
            # A plain norm saves its input in float32.
            widest = max(shape.hidden_size, self._query_width)
            norms = family.norms_per_layer * widest * _FLOAT32
        graphs, inputs = shape.layers, 0
        if checkpointing:
            graphs = segment_length(shape.layers, shape.hidden_size, graph_width(shape))
            inputs = -(-shape.layers // graphs) * shape.hidden_size
        return (inputs + self._backward_width + graphs * layer) * self._itemsize + graphs * norms

    def trace_bytes(self, jobs: Sequence[TraceJob], checkpointing: bool) -> int:
        """Return the bytes that a pass needs: on a CPU with its results, which lie there too."""
        shape, itemsize = self._shape, self._itemsize
        lengths = [len(job.token_ids) for job in jobs]
        tokens = sum(lengths)
        kernel = kernel_for(self._loaded.device, self._loaded.dtype, head_size(self._loaded))
        total = kernel.padding * self._query_width * _FLOAT32 * len(jobs)
        if not jobs[0].sites:
            total += tokens * self._backward_width * itemsize
        else:
            total += tokens * self.bytes_per_token(jobs[0].rule, checkpointing)
            passes = max(len(job.targets) for job in jobs)
            total += tokens * (passes - 1) * shape.hidden_size * itemsize * checkpointing
        # Hooks hold the tensors of a site until its gradient has come; relevance is the product
        # of two factors in float32.
        # Of these, the first process has the whole of all.
        widths = {"neuron": shape.intermediate_size, "head": shape.heads * head_size(self._loaded)}
        sites = {site for job in jobs for site in job.sites} - {"resid", "embed"}
        held = [widths.get(site, shape.hidden_size) for site in sites]
        layers = 1 if checkpointing else shape.layers
        total += tokens * (layers * itemsize * sum(held) + 3 * _FLOAT32 * max(held, default=0))
        total += self._window_bytes(lengths, layers)
        total += sum(self._target_and_edit_bytes(job) for job in jobs)
        return total + (self._result_bytes(jobs) if self._on_cpu else 0)

    def generation_bytes(self, jobs: Sequence[GenerateJob]) -> int:
        """Return the bytes that it takes to generate tokens for jobs together, padded."""
        shape, itemsize = self._shape, self._itemsize
        rows, longest = len(jobs), max(len(job.token_ids) for job in jobs)
        total_tokens = max(job.total_tokens for job in jobs)
        # Tokens that go through the model at a time.
        limit = longrope_limit(self._config)
        step = min(rows * longest, max(PROMPT_TOKENS, rows))
        if limit is not None and total_tokens > limit:
            step = rows * total_tokens
        total = step * self._backward_width * itemsize
        # Keys and values; a layer's are copied when they grow.
        columns = total_tokens + ROOM
        total += rows * columns * 2 * (shape.layers + 1) * self._key_width * itemsize
        # The attention mask, as booleans and as what is added to the scores.
        total += max(step, rows) * total_tokens * (1 + itemsize)
        sampled = sum(job.sampling.temperature != 0 for job in jobs)
        # Logits as they come and as float32, twice; of those sampled, five tables of 8 bytes.
        return total + shape.vocab_size * (rows * (itemsize + 2 * _FLOAT32) + sampled * 5 * 8)

    def _free_on_host(self) -> int:
        now = time.monotonic()
        if now - self._host_read_at > _HOST_READING_SECONDS:
            self._host_bytes, self._host_read_at = free_host_bytes(), now
        return self._host_bytes

    def _target_and_edit_bytes(self, job: TraceJob) -> int:
        shape = self._shape
        if job.only_terms:
            # Of each term a row of the hidden states and one of the weights, as float32.
            terms = sum(len(target.terms) for target in job.targets)
            total = terms * shape.hidden_size * 4 * _FLOAT32
        else:
            # Logits, capped or not, their gradients, float32 copies for log-probabilities.
            rows = len({term.position for target in job.targets for term in target.terms})
            total = rows * shape.vocab_size * (4 * self._itemsize + 3 * _FLOAT32)
        # The graph keeps which rows and columns each edit changes, or which cells.
        for edit in job.edits:
            rows, columns = len(job.token_ids), len(edit.features)
            total += 32 * (rows + columns + min(rows * columns, MANY_CELLS))
        return total

    def _result_bytes(self, jobs: Sequence[TraceJob]) -> int:
        """Return the bytes of host memory of the jobs' results: as recorded, and handed out."""
        return sum(2 * result_bytes(job, self._shape) for job in jobs)

    def _window_bytes(self, lengths: Sequence[int], layers: int) -> int:
        """Return what prompts longer than a sliding window need beyond others, on a CPU.

        What is behind the first window is cut into blocks as long as it, the last one padded;
        keys and values stand in two blocks each. Measured, that is up to 3 times the width of
        keys and 1.5 times that of queries.
        """
        window: int | None = getattr(self._config, "sliding_window", None)
        if window is None or not self._on_cpu:
            return 0
        kinds = getattr(self._config, "layer_types", None)
        if kinds:
            layers = min(layers, kinds.count("sliding_attention"))
        blocks = sum(-(-(n - window) // window) for n in lengths if n > window)
        width = (3 * self._key_width + 3 * self._query_width // 2) * self._itemsize
        mask = 2 * window**2 * (self._itemsize + 1) if blocks else 0
        return mask + layers * width * window * blocks


def _too_large(what: str, need: int, available: int) -> EngineError:
    return EngineError(
        f"{what}: it needs {need} bytes ({need / GIB:.3g} GiB) and {available} "
        f"({available / GIB:.3g} GiB) are available"
    )
