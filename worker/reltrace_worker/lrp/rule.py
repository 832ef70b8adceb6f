"""The rules: what replaces a model's functions so that gradient times input is relevance.

AttnLRP: Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers", ICML 2024. CP-LRP: Ali et al., "XAI for Transformers: Better Explanations through
Conservative Propagation", ICML 2022. The functions are lxt's, fused where that
pays (``fused`` says how, and tests prove them equal).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reltrace_worker.lrp import fused
from reltrace_worker.lrp import lxt_functions as lxt
from reltrace_worker.lrp.attention import AttentionFunction
from reltrace_worker.lrp.norms import plus_one_norm_forward
from reltrace_worker.models.families import Family, NormKind


def _as_it_is(attention: AttentionFunction) -> AttentionFunction:
    return attention


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to propagate relevance.

    Parameters
    ----------
    name
        As jobs name it.
    norm, gated_mlp
        ``forward(self, hidden_states)`` of every norm and gated MLP; None leaves them alone.
    wrap_attention
        Wraps the attention kernel.
    plus_one_norm
        The same as `norm` for norms that multiply by one plus their weight.
    """

    name: str
    norm: lxt.Forward | None = None
    gated_mlp: lxt.Forward | None = None
    wrap_attention: Callable[[AttentionFunction], AttentionFunction] = _as_it_is
    plus_one_norm: lxt.Forward | None = None

    @property
    def attention_name(self) -> str:
        """Name of the wrapped kernel in transformers' attention registry."""
        return f"reltrace_{self.name}"

    def norm_of(self, family: Family) -> lxt.Forward | None:
        """Return the forward of a family's norms."""
        return self.plus_one_norm if family.norm_kind is NormKind.RMS_PLUS_ONE else self.norm


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "attnlrp",
            norm=fused.rms_norm_forward,
            gated_mlp=fused.gated_mlp_forward,
            wrap_attention=fused.wrap_attention_forward,
            plus_one_norm=plus_one_norm_forward,
        ),
        Rule(
            "cp_lrp",
            norm=fused.rms_norm_forward,
            gated_mlp=fused.cp_gated_mlp_forward,
            wrap_attention=lxt.cp_wrap_attention_forward,
            plus_one_norm=plus_one_norm_forward,
        ),
        Rule("gradient"),
    )
}
