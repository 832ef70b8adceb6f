"""Calls that run a whole corpus of prompts. `generate.py` makes their synchronous forms."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from reltrace.atlas.atlas import Atlas
from reltrace.atlas.build import build
from reltrace.atlas.settings import AtlasSettings
from reltrace.calls.progress import Progress
from reltrace.evaluation.evaluation import Evaluation
from reltrace.evaluation.run import Evaluator
from reltrace.evaluation.settings import Keep, Measure, Settings
from reltrace.transport.connection import Connection
from reltrace.transport.retry import Deadline
from reltrace.types.request import Arguments, Priority
from reltrace.types.target import TargetLike


class AsyncStudies:
    """The calls of `AsyncClient` that build an atlas and evaluate rules."""

    _connection: Connection

    async def build_atlas(
        self,
        prompts: Iterable[str | Mapping[str, Any]],
        out: str | PathLike[str],
        *,
        model: str | None = None,
        rule: str = "attnlrp",
        target: TargetLike | None = None,
        positions: int | None = None,
        seed: int = 0,
        keep_special: bool = False,
        add_special_tokens: bool = True,
        k: int = 16,
        slice: int = 1024,  # noqa: A002 - as the folder calls it
        priority: Priority = "batch",
        progress: bool = False,
    ) -> Atlas:
        """Build an atlas: the strongest examples of every neuron and every head in a corpus.

        For each of them the atlas holds the k tokens with the largest relevance and the k with the
        largest activation, separately for positive and negative values, with counts, means and
        histograms. By default every prompt explains its own next tokens: the logits at all of its
        positions together, in one backward pass, so that the relevance of a token is its
        contribution to all that follows. The first token of a prompt, to which heads give
        attention that they do not need elsewhere, and special tokens are left out.

        Workers take the corpus in slices and merge on their device; results are merged into `out`.
        The atlas is the same, bit for bit, for any number of workers of the same kind. A call that
        was interrupted, also by SIGKILL, may be repeated with the same arguments: it computes what
        is missing, and reads the results of the interrupted call that the server still has.

        Parameters
        ----------
        prompts : iterable of str or mapping
            The corpus of at least one prompt: texts, or mappings with "prompt" or "messages" as in
            `trace`, and optionally an "id", which is not kept. Pulled as needed. A prompt that can
            not be traced is left out and recorded.
        out : path
            Folder; created if it does not exist.
        model : str, optional
            Name of a served model; default: the only one.
        rule : str, default "attnlrp"
            Propagation rule.
        target : str, int or Target, optional
            A target for every prompt instead of its next tokens; not a list and no continuation.
        positions : int, optional
            Explain the next tokens at only this many positions of each prompt, drawn at random;
            default: at all.
        seed : int, default 0
            Seed of these draws.
        keep_special : bool, default False
            Include first and special tokens.
        add_special_tokens : bool, default True
            As in `trace`, for prompts that are texts.
        k : int, default 16
            Examples in each list, 1 to 64.
        slice : int, default 1024
            Largest number of prompts that a worker takes at a time, 1 to 65536. With a small one, a
            worker that dies loses less work; with a large one, fewer bytes are sent. The first
            slices have 16 prompts, later ones at most a quarter of all prompts before them.
        priority : {"interactive", "batch"}
            Of all jobs.
        progress : bool, default False
            Show a tqdm bar.

        Returns
        -------
        Atlas
            `reltrace.load_atlas` reads it again.

        Raises
        ------
        InvalidArgument
            If an argument is wrong, or `out` holds an atlas of other settings or other prompts.
        ModelNotFound
            If no worker serves the model.
        JobFailed
            If a slice fails, for example because the model's numbers are not finite.
        """
        settings = AtlasSettings(
            model, rule, target, k, slice, priority, positions, seed, keep_special,
            add_special_tokens,
        )  # fmt: skip
        with Progress(prompts, shown=progress, unit="prompt") as bar:
            await build(self._connection, prompts, Path(out), settings, bar.add)
        return await asyncio.to_thread(Atlas, out)

    async def evaluate(
        self,
        prompts: Iterable[str | Mapping[str, Any]],
        *,
        rules: Sequence[str] = ("attnlrp", "cp_lrp", "gradient", "random"),
        site: str = "embed",
        target: TargetLike = "max",
        measure: Measure = "logprob",
        replace: str | int = "zero",
        keep: Keep = "special",
        model: str | None = None,
        points: int = 10,
        seed: int = 0,
        priority: Priority = "batch",
        progress: bool = False,
        timeout: float | None = None,
    ) -> Evaluation:
        """Measure how well the relevance of each rule identifies what predictions depend on.

        Tokens or neurons are switched off step by step, once with the most relevant and once with
        the least relevant first, and the target is measured. If relevance is right, the measure
        falls early in the first order and late in the second: the area between the two curves is
        the score of the rule. A random order has an area of 0 on average.

        The curves are straight from point to point, as `Evaluation.plot` draws them, on an axis of
        length 1, so that the area is in units of the measure. For tokens the axis is their share.
        For neurons, of which a few among thousands matter, it is log(1 + n) for n neurons; it ends
        at half of the neurons, where both orders begin to share neurons, or at 4,096.

        Parameters
        ----------
        prompts : iterable
            Prompts, or mappings with "prompt", "messages" or "input_ids" and, optionally, "id",
            "add_special_tokens", "target" and "answer": what the prediction is known to depend on,
            as a text in the prompt that consists of whole tokens, apart from white space, or as
            positions of tokens (a list or 1-d array; repetitions count once). The default id is the
            index of the prompt; ids must differ. Pulled as in `trace_many`.
        rules : sequence of str
            Rules that the model's workers serve, and "random".
        site : {"embed", "neuron"}
            What is switched off: tokens, by replacing their input embeddings, up to all that are
            not kept; or neurons, which are set to 0 at these tokens, up to half of them, at most
            4,096.
        target : str, int or Target, default "max"
            As in `trace`, except that a text is the continuation of the prompt, of one or several
            tokens, explained and measured as one (`Target(continuation=...)`). The token to which
            "max" resolves remains the target while tokens or neurons are switched off.
        measure : {"logprob", "probability", "logit"}
            What is measured of the target; what is explained depends only on `target`. A logit may
            rise when tokens are switched off, together with the logits of all other tokens.
        replace : str or int, default "zero"
            What replaces tokens: "zero" (zeros as input embeddings), "mean" (the mean over the
            vocabulary), or another token, by its text or id. For neurons only "zero".
        keep : {"special", "none"}
            Tokens that are never switched off, nor their neurons: "special" for the first one and
            the tokenizer's special tokens, to which models give unused attention.
        model : str, optional
            Name of a served model; default: the only one.
        points : int, default 10
            Steps of a curve, 2 to 100, of equal length on its axis. With as many as a prompt has
            tokens, they are switched off one by one; fewer steps flatten its curves.
        seed : int, default 0
            Seed of the random order, from 0.
        priority : {"interactive", "batch"}
            Of all jobs.
        progress : bool, default False
            Show a tqdm bar.
        timeout : float, optional
            Seconds for the whole run; default: as long as it takes.

        Returns
        -------
        Evaluation
            Scores by rule, with 95 % confidence intervals over prompts. Prompts that can not be
            evaluated are left out and listed in its `failures`; reasons not to trust the scores
            are in its `warnings`.

        Raises
        ------
        InvalidArgument
            If an argument is wrong, the model has no such rule or target, or there is no prompt.
        TraceError
            As `trace` does.
        Exception
            An exception of `prompts`.

        Notes
        -----
        A prompt costs a trace per rule, and at most ``2 * points`` forward passes per rule.
        """
        settings = Settings(
            rules=rules,
            site=site,
            measure=measure,
            replace=replace,
            keep=keep,
            points=points,
            seed=seed,
        )
        bar = Progress(prompts, shown=progress, unit="prompt")
        evaluator = Evaluator(
            self._connection,
            settings,
            Arguments(model=model, target=target),
            priority,
            Deadline(timeout),
            bar.count,
        )
        with bar:
            return await evaluator.run(prompts)
