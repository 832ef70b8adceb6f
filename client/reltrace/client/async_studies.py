"""Calls that run a whole corpus of prompts. `generate.py` makes their synchronous forms."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from reltrace.atlas.atlas import Atlas
from reltrace.atlas.build import Plan as AtlasPlan
from reltrace.atlas.build import build
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
        """Keep, of a corpus, the strongest places of every neuron and every head.

        For each of them the k places (prompt, token) where its relevance, and where its activation,
        is largest, positive and negative apart, with counts, means and histograms. By default every
        prompt explains its own next token at all of its positions: the logits together, in one
        backward pass, so that the relevance of a place is its part in all that follows. The first
        token of a prompt, where attention rests when it is not needed, and special tokens are left
        out of places, means and histograms. Workers take the
        corpus in slices and merge on their device; what comes back is merged into `out`. The same
        atlas comes of any number of workers of a kind, bit for bit. The call may be made again with
        the same arguments: it does what is missing, also after SIGKILL, and reads what the server
        has made for the call before.

        Parameters
        ----------
        prompts : iterable of str or mapping
            The corpus, at least one: texts, or mappings with "prompt" or "messages", a
            conversation as in `trace`, and perhaps an "id", which is not kept; pulled as needed.
            One that can not be traced is left out and noted.
        out : path
            Folder; made if need be.
        model : str, optional
            Name of a served model; default: the only one.
        rule : str, default "attnlrp"
            Propagation rule.
        target : str, int or Target, optional
            What is explained of every prompt instead of its next tokens: one, at its end by default
            ("max" is what the model predicts there), and no continuation.
        positions : int, optional
            Explain next tokens at so many positions of each prompt, drawn by `seed`; default: at
            all.
        seed : int, default 0
            Of the draws.
        keep_special : bool, default False
            Count first and special tokens as well.
        add_special_tokens : bool, default True
            As in `trace`, of the prompts that are texts.
        k : int, default 16
            Places of each list, 1 to 64.
        slice : int, default 1024
            Prompts that a worker takes at a time at most, 1 to 65536: fewer are lost with a worker,
            more send fewer bytes. The first slices have 16 prompts, later ones up to a quarter of
            what was before them.
        priority : {"interactive", "batch"}
            Of all jobs.
        progress : bool, default False
            Show a bar.

        Returns
        -------
        Atlas
            `reltrace.load_atlas` reads it again.

        Raises
        ------
        InvalidArgument
            If an argument is wrong, or `out` holds an atlas of other settings, of other prompts or
            of more.
        ModelNotFound
            If no worker serves the model.
        JobFailed
            If a slice can not be made: the model's numbers are not finite, say.
        """
        plan = AtlasPlan(
            model, rule, target, k, slice, priority, positions, seed, keep_special,
            add_special_tokens,
        )  # fmt: skip
        with Progress(prompts, shown=progress, unit="prompt") as bar:
            await build(self._connection, prompts, Path(out), plan, bar.add)
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
        """Measure how well each rule tells what predictions rest on.

        What a rule calls most relevant is switched off first, step by step, then what it calls
        least relevant, and the target is measured. A rule that knows what the prediction rests on
        makes it fall at once in the one order and stay in the other: the area between the curves is
        its score. A random order has an area of 0 on average.

        The area is that between the curves as `Evaluation.plot` draws them: straight from point to
        point, on an axis of length 1, so that it is in units of the measure. The axis of tokens is
        their share. That of neurons has n of them at log(1 + n): as many of a model's thousands
        matter as a few, and on an axis of numbers these would have no width. It ends at half of
        the neurons, past which both orders switch off the same ones, or at 4,096.

        Parameters
        ----------
        prompts : iterable
            Prompts, or mappings with "prompt", "messages" or "input_ids" and, optionally, "id",
            "add_special_tokens", "target" and "answer": what the prediction is known to rest on, as
            a text in the prompt that is made of whole tokens, but for white space, or as positions
            of tokens (a list or 1-d array; one that is repeated counts once). No two have the same
            id; where none is given, it is the prompt's place. Pulled as needed, in a thread of its
            own unless it is a list or tuple.
        rules : sequence of str
            Rules that the model's workers serve, and "random".
        site : {"embed", "neuron"}
            What is switched off: tokens, by what takes the place of their input embeddings, from
            none to all that are not kept; or neurons, set to 0 at these tokens, from none to half
            of them, at most 4,096.
        target : str, int or Target, default "max"
            As in `trace`, but for a text: it is what follows the prompt, of one token or several,
            explained and measured as one (`Target(continuation=...)`). What it resolves to stays
            the target while things are switched off.
        measure : {"logprob", "probability", "logit"}
            What of the target is measured; what is explained, `target` says. A logit alone may rise
            as tokens go, with those of all other tokens.
        replace : str or int, default "zero"
            What takes the place of tokens: "zero" and "mean" are input embeddings (that of zeros,
            and the mean over the vocabulary); any other text, or an id, is a token. Of neurons:
            "zero".
        keep : {"special", "none"}
            Tokens that stay as they are, with their neurons: the first one and the tokenizer's
            special tokens, on which models rest their attention; or none.
        model : str, optional
            Name of a served model; default: the only one.
        points : int, default 10
            Steps of a curve, 2 to 100, equal on its axis. As many as a prompt has tokens switch
            them off one by one; fewer cut the corners of its curves.
        seed : int, default 0
            Of the random order, from 0.
        priority : {"interactive", "batch"}
            Of all jobs.
        progress : bool, default False
            Show a tqdm bar.
        timeout : float, optional
            Seconds for the whole run; default: as long as it takes.

        Returns
        -------
        Evaluation
            Scores by rule, with 95 % confidence intervals over prompts. A prompt that can not be
            evaluated is left out, and noted in its `failures`; why the scores can not be trusted,
            where they can not, in its `warnings`.

        Raises
        ------
        InvalidArgument
            If an argument is wrong, or there is no prompt; the message names it and what is
            allowed. So do rules and targets that the model does not have.
        ModelNotFound
            If no worker serves the model.
        Unavailable
            If the server can not be reached for `retry_timeout` seconds.
        DeadlineExceeded
            If `timeout` is over.
        Exception
            What `prompts` raises.

        Notes
        -----
        A prompt costs a trace per rule, and at most ``2 * points`` forward passes per rule.
        """
        settings = Settings.of(
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
