"""How much memory a pass needs, computed from the shapes of the model and of its jobs.

Weights take no gradient, and attention over a pack keeps nothing quadratic, so what a pass
allocates grows by the same amount with every token. The graph of a decoder layer keeps the query,
the key, the value and the output of attention, two factors of the gated product (three under
plain gradients), what plain norms save, and the residual stream. Without checkpointing the graphs
of all layers are kept, with it the input of every segment and the graph of one. One layer's
backward pass comes on top. What jobs ask for beyond (logits, further sites, targets, edits,
results) is added by its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reltrace_worker.engine.edits import MANY_CELLS
from reltrace_worker.engine.passes import graph_width, segment_length
from reltrace_worker.engine.reductions import REDUCTIONS, Extent
from reltrace_worker.engine.sites import SITES
from reltrace_worker.lrp import RULES, Rule
from reltrace_worker.lrp.attention import kernel_for
from reltrace_worker.lrp.ops import activation_name
from reltrace_worker.models.loading import LoadedModel
from reltrace_worker.types.jobs import GenerateJob, TraceJob

_UNKNOWN_ACTIVATION = 3
"""Factors of the gated product's width that an activation made of plain operations keeps beside
its input: of those that transformers has, GELU by its formula ("gelu_new") keeps most, 2."""


def head_size(loaded: LoadedModel) -> int:
    """Return the values of one attention head."""
    config: Any = loaded.model.config
    return int(getattr(config, "head_dim", None) or loaded.shape.hidden_size // loaded.shape.heads)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes that a pass over a model allocates at its peak, weights not counted.

    Parameters
    ----------
    loaded
        The model.
    rules
        Of the engine.
    """

    loaded: LoadedModel
    rules: Mapping[str, Rule] = field(default_factory=lambda: RULES)

    @property
    def _query_width(self) -> int:
        return self.loaded.shape.heads * head_size(self.loaded)

    @property
    def _key_width(self) -> int:
        heads = getattr(self.loaded.model.config, "num_key_value_heads", None)
        return int(heads or self.loaded.shape.heads) * head_size(self.loaded)

    @property
    def _backward_width(self) -> int:
        """Values per token that one layer's forward or backward pass holds for a moment."""
        shape = self.loaded.shape
        return 3 * shape.intermediate_size + 2 * shape.hidden_size + 4 * self._query_width

    def per_token(self, rule: str, checkpointing: bool) -> int:
        """Return the bytes of one more token in a pass by a rule that records ``resid``."""
        shape, itemsize = self.loaded.shape, self.loaded.dtype.itemsize
        # Of CUDA's kernels, the one for float32 takes no grouped heads: they are repeated.
        grouped = self.loaded.device.type == "cpu" or itemsize < torch.float32.itemsize
        layer = 2 * self._query_width + 2 * (self._key_width if grouped else self._query_width)
        found, family = self.rules[rule], self.loaded.family
        layer += found.mlp_tensors * shape.intermediate_size
        mlp = next(m for m in self.loaded.model.modules() if isinstance(m, family.gated_mlp))
        if activation_name(getattr(mlp, family.activation)) is None:
            layer += _UNKNOWN_ACTIVATION * shape.intermediate_size
        # The residual stream; of attention and of norms some numbers per head and row.
        layer += shape.hidden_size + 2 * shape.heads
        norms = 0
        if family.norm not in found.patches:
            # A plain norm saves its input in float32.
            widest = max(shape.hidden_size, self._query_width)
            norms = family.norms_per_layer * widest * torch.float32.itemsize
        graphs, inputs = shape.layers, 0
        if checkpointing:
            graphs = segment_length(shape.layers, shape.hidden_size, graph_width(shape))
            inputs = -(-shape.layers // graphs) * shape.hidden_size
        return (inputs + self._backward_width + graphs * layer) * itemsize + graphs * norms

    def need(self, jobs: Sequence[TraceJob], checkpointing: bool) -> int:
        """Return the bytes that a pass over `jobs` needs on the model's devices."""
        shape, itemsize = self.loaded.shape, self.loaded.dtype.itemsize
        tokens = sum(len(job.token_ids) for job in jobs)
        kernel = kernel_for(self.loaded.device, self.loaded.dtype, head_size(self.loaded))
        total = kernel.padding * self._query_width * torch.float32.itemsize * len(jobs)
        if not jobs[0].sites:
            total += tokens * self._backward_width * itemsize
        else:
            total += tokens * self.per_token(jobs[0].rule, checkpointing)
            passes = max(len(job.targets) for job in jobs)
            total += tokens * (passes - 1) * shape.hidden_size * itemsize * checkpointing
        # Hooks hold what they watch until its gradient has come; relevance is the product of two
        # factors in float32.
        sites = {site for job in jobs for site in job.sites} - {"resid", "embed"}
        widths = [self._site_width(site) for site in sites]
        held = 1 if checkpointing else shape.layers
        total += tokens * (held * itemsize * sum(widths) + 3 * 4 * max(widths, default=0))
        total += self._beyond_window([len(job.token_ids) for job in jobs], held)
        for job in jobs:
            if job.only_terms:
                # Of each term a row of the hidden states and one of the weights, as float32.
                terms = sum(len(target.terms) for target in job.targets)
                total += terms * shape.hidden_size * 4 * 4
            else:
                # Logits, capped or not, their gradients, float32 copies for log-probabilities.
                rows = len({term.position for target in job.targets for term in target.terms})
                total += rows * shape.vocab_size * (4 * itemsize + 3 * 4)
            # The graph keeps which rows and columns each edit changes, or which cells.
            for edit in job.edits:
                rows, columns = len(job.token_ids), len(edit.features)
                total += 32 * (rows + columns + min(rows * columns, MANY_CELLS))
        return total

    def results(self, jobs: Sequence[TraceJob]) -> int:
        """Return the bytes of host memory of the jobs' results: as recorded, and handed out."""
        total = 0
        for job in jobs:
            reduction = REDUCTIONS[job.reduction]
            for name in job.sites:
                features = SITES[name].features(self.loaded.shape)
                extent = Extent(len(job.token_ids), 1, features, job.k)
                values = len(job.targets) * len(reduction.parts)
                if SITES[name].per_layer:
                    values *= len(job.layers) or self.loaded.shape.layers
                for size in reduction.shape(extent):
                    values *= size
                total += 2 * 4 * values
        return total

    def need_to_write(self, jobs: Sequence[GenerateJob]) -> int:
        """Return the bytes that it takes to write the texts of `jobs` together, padded."""
        shape, itemsize = self.loaded.shape, self.loaded.dtype.itemsize
        rows, longest = len(jobs), max(len(job.token_ids) for job in jobs)
        extent = max(job.total_tokens for job in jobs)
        total = rows * longest * self._backward_width * itemsize
        # Keys and values; a layer's are copied when they grow.
        total += rows * extent * 2 * (shape.layers + 1) * self._key_width * itemsize
        if any(len(job.token_ids) < longest for job in jobs):
            # Who sees whom, as truth values and as what is added to the scores.
            total += rows * longest**2 * (1 + itemsize)
        sampled = sum(job.sampling.temperature != 0 for job in jobs)
        # Logits as they come and as float32, twice; of those drawn from, five tables of 8 bytes.
        return total + shape.vocab_size * (rows * (itemsize + 2 * 4) + sampled * 5 * 8)

    def _site_width(self, site: str) -> int:
        shape = self.loaded.shape
        wide = {"neuron": shape.intermediate_size, "head": self._query_width}
        return wide.get(site, shape.hidden_size)

    def _beyond_window(self, lengths: Sequence[int], held: int) -> int:
        """Return what prompts longer than a sliding window need beyond others, on a CPU.

        What is behind the first window is cut into blocks as long as it, the last one padded;
        keys and values stand in two blocks each. Measured, that is up to 3 times the width of
        keys and 1.5 times that of queries.
        """
        config: Any = self.loaded.model.config
        window: int | None = getattr(config, "sliding_window", None)
        if window is None or self.loaded.device.type != "cpu":
            return 0
        kinds = getattr(config, "layer_types", None)
        layers: int = min(held, kinds.count("sliding_attention")) if kinds else held
        blocks = sum(-(-(n - window) // window) for n in lengths if n > window)
        itemsize = self.loaded.dtype.itemsize
        width = (3 * self._key_width + 3 * self._query_width // 2) * itemsize
        mask = 2 * window**2 * (itemsize + 1) if blocks else 0
        return mask + layers * width * window * blocks
