"""How much memory a pass needs; what there is, `budget` knows.

What a pass allocates grows by the same amount with every token, because attention over a pack
keeps nothing that is quadratic. Two passes per mode give that line: torch counts
every byte of a CUDA device, and its profiler every allocation on a CPU. What a pass needs beyond
(logits of many targets, wider sites, large results) is added by formula.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reltrace_worker.engine.budget import devices_of
from reltrace_worker.engine.edits import MANY_CELLS
from reltrace_worker.engine.reductions import REDUCTIONS, Extent
from reltrace_worker.engine.sites import SITES
from reltrace_worker.jobs import PreparedJob
from reltrace_worker.model.loading import LoadedModel
from reltrace_worker.rules.kernels import kernel_for

_PROBE_TOKENS = {"cpu": (64, 256), "cuda": (128, 640)}
"""Of two passes: large enough that their peaks are where those of large passes are."""


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes as a function of tokens."""

    fixed: float
    per_token: float

    @staticmethod
    def through(first: tuple[int, int], second: tuple[int, int]) -> Line:
        """Return the line through two measurements (tokens, bytes)."""
        per_token = (second[1] - first[1]) / (second[0] - first[0])
        return Line(max(0.0, first[1] - per_token * first[0]), per_token)

    def at(self, tokens: int) -> float:
        """Return the bytes for so many tokens."""
        return self.fixed + self.per_token * tokens

    def tokens(self, limit: float) -> int:
        """Return the most tokens whose bytes stay within `limit`; 0 where none do."""
        return max(0, int((limit - self.fixed) // max(self.per_token, 1.0)))


@dataclass(frozen=True, slots=True)
class Window:
    """What prompts that are longer than a sliding window need beyond others, on a CPU.

    Parameters
    ----------
    tokens
        That a token sees.
    layers
        That have it.
    per_token
        Bytes of the copies of one token's query, keys and values in one layer.
    itemsize
        Bytes of an activation.
    """

    tokens: int
    layers: int
    per_token: int
    itemsize: int

    def need(self, lengths: Sequence[int], layers: int) -> int:
        """Return the bytes for prompts of these lengths, of which so many layers are kept."""
        # What is behind the first window is cut into blocks as long as it, the last one padded.
        cut = [-(-(n - self.tokens) // self.tokens) for n in lengths if n > self.tokens]
        mask = 2 * self.tokens**2 * (self.itemsize + 1) if cut else 0
        return mask + layers * self.per_token * self.tokens * sum(cut)

    @staticmethod
    def of(loaded: LoadedModel) -> Window | None:
        """Return that of a model whose prompts reach past it, and past what is measured."""
        if loaded.device.type != "cpu":
            return None
        config: Any = loaded.model.config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        layers = kinds.count("sliding_attention") if kinds else loaded.shape.layers
        if not window or not max(_PROBE_TOKENS["cpu"]) <= window < loaded.context_length:
            return None
        # Keys and values stand there twice; measured, that is up to 3 times their width, and 1.5
        # times that of the queries.
        width = 3 * _key_width(loaded) + 3 * loaded.shape.heads * head_size(loaded) // 2
        itemsize = loaded.dtype.itemsize
        return Window(int(window), layers, width * itemsize, itemsize)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes that a pass over a pack allocates at its peak, weights not counted.

    Parameters
    ----------
    keeping, checkpointed
        Measured without and with checkpointing: one target per pass, site ``resid``.
    layers, hidden_size, vocab_size
        Sizes of the model.
    widths
        Values per token of each site's tensor, and of its feature axis.
    itemsize
        Bytes of an activation.
    per_prompt
        Bytes that the attention kernel needs for each prompt, whatever its length.
    cache_per_token
        Bytes of a token's keys and values in all layers.
    window
        Of the layers with a sliding window that is longer than what was measured; None: there are
        none.
    """

    keeping: Line
    checkpointed: Line
    layers: int
    hidden_size: int
    vocab_size: int
    widths: dict[str, tuple[int, int]]
    itemsize: int
    per_prompt: int = 0
    cache_per_token: int = 0
    window: Window | None = None

    def need(self, jobs: Sequence[PreparedJob], checkpointing: bool) -> int:
        """Return the bytes that a pass over `jobs` needs."""
        tokens = sum(len(job.token_ids) for job in jobs)
        line = self.checkpointed if checkpointing else self.keeping
        total = line.at(tokens) + self.per_prompt * len(jobs)
        # Logits, their gradient, and three float32 copies for log-probabilities.
        for job in jobs:
            if job.only_terms:
                # Of each term a row of the hidden states and one of the weights, as float32.
                terms = sum(len(target.terms) for target in job.targets)
                total += terms * self.hidden_size * 4 * 4
                continue
            rows = len({term.position for target in job.targets for term in target.terms})
            copies = 3 * 4 if any(target.logprob for target in job.targets) else 0
            total += rows * self.vocab_size * (2 * self.itemsize + copies)
        # Hooks hold what they watch until its gradient has come.
        sites = {site for job in jobs for site in job.sites} - {"resid", "embed"}
        held = 1 if checkpointing else self.layers
        total += held * tokens * self.itemsize * sum(self.widths[site][0] for site in sites)
        # Relevance of the widest site: two factors in float32, and their product.
        total += 3 * 4 * tokens * max((self.widths[s][0] for s in sites), default=0)
        # The graph keeps which rows and columns each edit changes, or which cells.
        for job in jobs:
            rows = len(job.token_ids)
            for edit in job.edits:
                columns = len(edit.features)
                total += 32 * (rows + columns + min(rows * columns, MANY_CELLS))
        if self.window is not None:
            lengths = [len(job.token_ids) for job in jobs]
            total += self.window.need(lengths, 1 if checkpointing else self.window.layers)
        if checkpointing:
            passes = max(len(job.targets) for job in jobs)
            total += max(0, passes - 1) * tokens * self.hidden_size * self.itemsize
        return int(total) + sum(self._result(job) for job in jobs)

    def need_to_write(self, jobs: Sequence[PreparedJob]) -> int:
        """Return the bytes that it takes to write the texts of `jobs` together, padded."""
        rows = len(jobs)
        longest = max(len(job.token_ids) for job in jobs)
        extent = max(job.extent for job in jobs)
        # Layer by layer, and nothing is kept: no more than a checkpointed pass needs.
        total = self.checkpointed.at(rows * longest)
        # A layer's cache is copied when it grows.
        total += rows * extent * self.cache_per_token * (1 + 1 / self.layers)
        if any(len(job.token_ids) < longest for job in jobs):
            # Who sees whom, as truth values and as what is added to the scores.
            total += rows * longest**2 * (1 + self.itemsize)
        sampled = sum(
            job.generation is not None and job.generation.temperature != 0 for job in jobs
        )
        # Logits as they come and as float32, twice; of those drawn from, five tables of 8 bytes.
        total += self.vocab_size * (rows * (self.itemsize + 2 * 4) + sampled * 5 * 8)
        return int(total)

    def _result(self, job: PreparedJob) -> int:
        """Return the bytes of a job's result, counted twice: as recorded, and as handed out."""
        total = 0
        for name in job.sites:
            reduction = REDUCTIONS[job.reduction]
            extent = Extent(len(job.token_ids), 1, self.widths[name][1], job.k)
            layers = (len(job.layers) or self.layers) if SITES[name].per_layer else 1
            values = layers
            for size in reduction.shape(extent):
                values *= size
            total += values * 4 * len(reduction.parts)
        return 2 * total * len(job.targets)


def _peak_on_cpu(run: Callable[[], object]) -> int:
    # Kineto announces every start and stop on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.autograd.profiler import profile

    with profile(profile_memory=True, use_kineto=True) as profiler:
        run()
    results: Any = profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    return most


def _peak_on_cuda(run: Callable[[], object], devices: Sequence[torch.device]) -> int:
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(torch.cuda.memory_allocated(device) for device in devices)
    run()
    for device in devices:
        torch.cuda.synchronize(device)
    return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before


def head_size(loaded: LoadedModel) -> int:
    """Return the values of one attention head."""
    config: Any = loaded.model.config
    return int(getattr(config, "head_dim", None) or loaded.shape.hidden_size // loaded.shape.heads)


def _key_width(loaded: LoadedModel) -> int:
    config: Any = loaded.model.config
    heads = getattr(config, "num_key_value_heads", None) or loaded.shape.heads
    return int(heads) * head_size(loaded)


def peak_bytes(loaded: LoadedModel, run: Callable[[], object]) -> int:
    """Return the most bytes that `run` has allocated at a time, beyond what was there before."""
    if loaded.device.type == "cuda":
        return _peak_on_cuda(run, devices_of(loaded))
    return _peak_on_cpu(run)


def measure(loaded: LoadedModel, probe: Callable[[int, bool], object]) -> MemoryModel:
    """Measure the memory of passes over one model.

    Parameters
    ----------
    loaded
        The model.
    probe
        Runs a pass over one prompt of so many tokens, with or without checkpointing.
    """
    lines = {}
    most = loaded.context_length
    probes = _PROBE_TOKENS[loaded.device.type][::-1]
    sizes = [min(tokens, max(1, most - place)) for place, tokens in enumerate(probes)]
    for checkpointing in (False, True):
        # The first pass of a process allocates what stays (cuBLAS workspaces, for example).
        probe(1, checkpointing)
        points = [
            (n, peak_bytes(loaded, lambda n=n, c=checkpointing: probe(n, c)))  # type: ignore[misc]
            for n in sizes
        ]
        if points[0][0] == points[1][0]:
            points[1] = (0, 0)
        lines[checkpointing] = Line.through(points[1], points[0])
    shape = loaded.shape
    wide = {"neuron": shape.intermediate_size, "head": shape.heads * head_size(loaded)}
    kernel = kernel_for(loaded.device, loaded.dtype, head_size(loaded))
    return MemoryModel(
        keeping=lines[False],
        checkpointed=lines[True],
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        widths={
            name: (wide.get(name, shape.hidden_size), site.features(shape))
            for name, site in SITES.items()
        },
        itemsize=loaded.dtype.itemsize,
        per_prompt=kernel.padding * wide["head"] * torch.float32.itemsize,
        window=Window.of(loaded),
        cache_per_token=2 * shape.layers * _key_width(loaded) * loaded.dtype.itemsize,
    )
