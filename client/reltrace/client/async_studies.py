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

        For each of them it holds the k tokens at which its relevance, and its activation, are
        largest, positive and negative apart, with counts, means and histograms. By default every
        prompt explains its own next tokens: the logits at all of its positions together, in one
        backward pass, so that the relevance at a token is its part in all that follows. The first
        token of a prompt, on which unused attention rests, and special tokens are left out.

        Workers take the corpus in slices and merge on their device; results are merged into `out`.
        The atlas is the same, bit for bit, for any number of workers of a kind. A call that was
        interrupted, by SIGKILL too, may be repeated with the same arguments: it does what is
        missing, and reads what the server has kept of the interrupted call.

        Parameters
        ----------
        prompts : iterable of str or mapping
            The corpus, at least one prompt: texts, or mappings with "prompt" or "messages" as in
            `trace`, and optionally an "id", which is not kept. Pulled as needed. A prompt that can
            not be traced is left out and noted.
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
            Most prompts that a worker takes at a time, 1 to 65536. Less work is lost with a worker
            if it is small, fewer bytes are sent if it is large. The first slices have 16 prompts,
            later ones at most a quarter of all prompts before them.
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
            If a slice can not be made, for example because the model's numbers are not finite.
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
        """Measure how well the relevance of each rule tells what predictions rest on.

        Tokens or neurons are switched off step by step, the most relevant first, then the least
        relevant first, and the target is measured. If relevance is right, the measure falls at
        once in the first order and stays in the second: the area between the two curves is the
        score of the rule. A random order has an area of 0 on average.

        The curves are straight from point to point, as `Evaluation.plot` draws them, on an axis of
        length 1, so that the area is in units of the measure. For tokens the axis is their share.
        For neurons, of which a few among thousands matter, n of them are at log(1 + n); the axis
        ends at half of the neurons, past which both orders switch off the same ones, or at 4,096.

        Parameters
        ----------
        prompts : iterable
            Prompts, or mappings with "prompt", "messages" or "input_ids" and, optionally, "id",
            "add_special_tokens", "target" and "answer": what the prediction is known to rest on, as
            a text in the prompt that consists of whole tokens, apart from white space, or as
            positions of tokens (a list or 1-d array; repetitions count once). The
            default id is the index of the prompt; ids must differ. Pulled as needed, in a thread of
            its own unless it is a list or tuple.
        rules : sequence of str
            Rules that the model's workers serve, and "random".
        site : {"embed", "neuron"}
            What is switched off: tokens, by replacing their input embeddings, from none to all
            that are not kept; or neurons, set to 0 at these tokens, from none to half of them, at
            most 4,096.
        target : str, int or Target, default "max"
            As in `trace`, except for a text: it is the continuation of the prompt, of one token or
            several, explained and measured as one (`Target(continuation=...)`). The token that
            "max" resolves to stays the target while things are switched off.
        measure : {"logprob", "probability", "logit"}
            What is measured of the target; what is explained depends on `target` alone. A logit may
            rise when tokens are switched off, together with those of all other tokens.
        replace : str or int, default "zero"
            What replaces tokens: "zero" (zeros as input embeddings), "mean" (the mean over the
            vocabulary), or a token by any other text or its id. For neurons only "zero".
        keep : {"special", "none"}
            Tokens that are never switched off, nor their neurons: the first one and the tokenizer's
            special tokens, on which models rest unused attention; or none.
        model : str, optional
            Name of a served model; default: the only one.
        points : int, default 10
            Steps of a curve, 2 to 100, of equal length on its axis. As many as a prompt has tokens
            switch them off one by one; fewer flatten its curves.
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
            evaluated are left out and noted in its `failures`; reasons not to trust the scores
            are in its `warnings`.

        Raises
        ------
        InvalidArgument
            If an argument is wrong, a rule or target is not one of the model's, or there is no
            prompt.
        TraceError
            As `trace` does.
        Exception
            What `prompts` raises.

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
