"""The tokenizer of a GGUF file, built from its metadata.

transformers builds one too (``integrations.gguf``). It knows fewer ways to split text and takes
GPT-2's for the others, adds no BOS for LLaMA 3, and needs seconds for the merges of a large
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer

from reltrace_worker.types.errors import ModelError

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4


def _byte_level(split: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level vocabulary splits text before it merges bytes."""

    pre_tokenizer: Any
    # A piece that is a token is taken as it is, and BOS is added unless the file says otherwise.
    whole_words: bool = False
    # Text is normalized first.
    nfc: bool = False


# As the tokenizer.json of these models and llama.cpp (src/llama-vocab.cpp) have it.
_GPT2 = _Split(pre_tokenizers.ByteLevel(add_prefix_space=False))
_SMOLLM = _Split(
    pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
)
_LLAMA3 = _Split(
    _byte_level(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    whole_words=True,
)
_QWEN2 = _Split(
    _byte_level(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    nfc=True,
)
_TEKKEN = _Split(
    _byte_level(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    whole_words=True,
)
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
"""By tokenizer.ggml.pre."""


def build_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """Build the tokenizer that the metadata of a GGUF file describes, with its chat template."""
    values = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind, tokens = values.get("model"), values.get("tokens", [])
    split = _SPLITS.get(values.get("pre", ""))
    special = {
        f"{name}_token": None if (i := values.get(f"{key}_token_id")) is None else tokens[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    add_bos = kind == "llama" or (split is not None and split.whole_words)
    options: dict[str, Any] = special | {
        "add_bos_token": values.get("add_bos_token", add_bos),
        "add_eos_token": values.get("add_eos_token", False),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    tokenizer: Any
    merges: list[Any]
    if kind == "gpt2" and split is not None:
        merges = [tuple(merge.split(" ")) for merge in values["merges"]]
        tokenizer = GPT2Tokenizer(vocab=_numbered(tokens), merges=merges, **options)
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = split.pre_tokenizer
        backend.normalizer = normalizers.NFC() if split.nfc else None
        backend.model.ignore_merges = split.whole_words
    elif kind == "gpt2":
        raise ModelError(
            f"the file splits text by {values.get('pre')!r} (tokenizer.ggml.pre); supported: "
            f"{', '.join(_SPLITS)}; serve the checkpoint that it was made from instead"
        )
    elif kind == "llama" and metadata.get("general.architecture") == "gemma3":
        # Runs of spaces are stored as such, and their order, not their scores, is that of merges.
        tokens = ["▁" * len(text) if text.isspace() and "  " in text else text for text in tokens]
        merges = list(_merges(tokens, range(0, -len(tokens), -1)))
        tokenizer = GemmaTokenizer(vocab=_numbered(tokens), merges=merges, **options)
    elif kind == "llama":
        tokenizer = LlamaTokenizer(
            vocab=_numbered(tokens),
            merges=list(_merges(tokens, values["scores"])),
            add_prefix_space=values.get("add_space_prefix", True),
            **options,
        )
    else:
        raise ModelError(
            f"the file's tokenizer is of kind {kind!r} (tokenizer.ggml.model); supported: gpt2, "
            "llama; serve the checkpoint that it was made from instead"
        )
    known = set(tokens)
    added: dict[int, list[AddedToken]] = {_CONTROL: [], _USER_DEFINED: []}
    for text, token_type in zip(values["tokens"], values.get("token_type", ()), strict=False):
        if token_type in added and text in known:
            token = AddedToken(text, normalized=False, special=token_type == _CONTROL)
            added[token_type].append(token)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": added[_CONTROL]}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens(added[_USER_DEFINED])
    return tokenizer


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate(tokens)}


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> Iterator[tuple[str, ...]]:
    """Yield the pairs of tokens that make up a token, best score first, longest left part first."""
    known = set(tokens)
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        text = tokens[i]
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in known and text[cut:] in known:
                yield text[:cut], text[cut:]
