"""Tokenizers out of GGUF files: the ids that the checkpoint's own tokenizer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference.checkpoints import SENTENCES, build_tokenizer
from reference.gguf_files import add_byte_level_tokenizer
from reltrace_worker.models.gguf import GgufFile
from reltrace_worker.models.gguf_tokenizer import build_tokenizer as built
from reltrace_worker.types.errors import ModelError
from tokenizers import pre_tokenizers
from transformers import GemmaTokenizer, LlamaTokenizer

TEXTS = (
    *SENTENCES,
    "",
    " a  5 cats and 12  dogs\n\n  end ",
    "Grüße aus Köln, 東京! 😀",
    "<s>twice</s>",
)


def byte_level(tmp_path: Path, pre: str) -> dict[str, Any]:
    """The metadata of a file with the reference tokenizer."""
    from gguf import GGUFWriter

    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    add_byte_level_tokenizer(writer, 320, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path).metadata


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    reference = build_tokenizer(320)
    tokenizer = built(byte_level(tmp_path, "gpt-2"))
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert set(tokenizer.all_special_ids) == {0, 1}
    assert tokenizer.chat_template is None


def test_digits_of_smollm_stand_alone(tmp_path: Path) -> None:
    """Spaces before a digit stay together, as digits are cut out first; GPT-2 takes one along."""
    reference: Any = build_tokenizer(320)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer = built(byte_level(tmp_path, "smollm"))
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text), text
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "I'm 12345 a,\n\nb", ["I", "'m", "Ġ", "123", "45", "Ġa", ",ĊĊ", "b"]),
        ("qwen2", "x 123", ["x", "Ġ", "1", "2", "3"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", "Ġ", "1", "2"]),
    ],
)
def test_how_text_is_split(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = built(byte_level(tmp_path, pre))
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


def test_llama_3_begins_with_bos_and_takes_whole_words(tmp_path: Path) -> None:
    metadata = byte_level(tmp_path, "llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    # A word of the vocabulary that no merge leads to.
    metadata["tokenizer.ggml.tokens"][300] = "xyzxyz"
    merges = metadata["tokenizer.ggml.merges"]
    known = set(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.merges"] = [m for m in merges if m.replace(" ", "") in known]
    assert built(metadata).encode("xyzxyz") == [0, 300]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert 300 not in built(metadata).encode("xyzxyz")
    assert built(metadata).encode("a")[0] != 0


def test_qwen_2_composes_characters(tmp_path: Path) -> None:
    tokenizer = built(byte_level(tmp_path, "qwen2"))
    assert tokenizer.encode("u\u0308") == tokenizer.encode("ü")


def test_another_way_to_split_is_refused(tmp_path: Path) -> None:
    metadata = byte_level(tmp_path, "gpt-2")
    metadata["tokenizer.ggml.pre"] = "viking"
    with pytest.raises(ModelError, match=r"splits text by 'viking' .*; supported: gpt-2, smollm"):
        built(metadata)
    del metadata["tokenizer.ggml.pre"]
    with pytest.raises(ModelError, match="splits text by None"):
        built(metadata)
    with pytest.raises(ModelError, match=r"is of kind 'bert' .*; supported: gpt2, llama"):
        built({"tokenizer.ggml.model": "bert"})


PIECES = ["<unk>", "<s>", "</s>", "▁", "s", "d", "o", "g", "▁d", "do", "▁do", "▁dog", "gs", "▁▁"]


def sentencepiece(architecture: str, **values: Any) -> dict[str, Any]:
    bytes_of_text = [f"<0x{i:02X}>" for i in range(256)]
    fields = {
        "model": "llama",
        "tokens": PIECES + bytes_of_text,
        "scores": [float(-i) for i in range(len(PIECES) + 256)],
        "token_type": [2, 3, 3, *[1] * (len(PIECES) - 3), *[6] * 256],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **values,
    }
    settings = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return {"general.architecture": architecture, **settings}


MERGES = [("▁", "d"), ("d", "o"), ("▁d", "o"), ("▁", "do"), ("▁do", "g"), ("g", "s"), ("▁", "▁")]
SPM_TEXTS = ("dogs", " dogs do", "  dog  s", "é dog", "s\ns")


def ids_of(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text) for text in SPM_TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary(prefix: bool) -> None:
    """
    Given pieces with scores, and bytes for what is none
    I expect the ids of LlamaTokenizer with the merges that the scores stand for, behind a BOS.
    """
    metadata = sentencepiece("llama", add_space_prefix=prefix)
    reference = LlamaTokenizer(
        vocab={text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])},
        merges=MERGES,  # type: ignore[arg-type]
        add_prefix_space=prefix,
        add_bos_token=True,
    )
    tokenizer = built(metadata)
    assert ids_of(tokenizer) == ids_of(reference)
    assert tokenizer.encode("dog") == [1, 11 if prefix else 9, *([] if prefix else [7])]
    assert built({**metadata, "tokenizer.ggml.add_bos_token": False}).encode("dog")[0] != 1


def test_gemma_begins_with_bos_and_has_no_space_before() -> None:
    metadata = sentencepiece("gemma3", add_bos_token=True)
    tokens = metadata["tokenizer.ggml.tokens"]
    reference = GemmaTokenizer(
        vocab={text: i for i, text in enumerate(tokens)},
        merges=MERGES,  # type: ignore[arg-type]
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        mask_token="<unk>",
        add_bos_token=True,
    )
    # As these files have it.
    tokens[PIECES.index("▁▁")] = "  "
    tokenizer = built(metadata)
    assert ids_of(tokenizer) == ids_of(reference)
    assert tokenizer.encode("  g") == [1, PIECES.index("▁▁"), PIECES.index("g")]


def test_the_chat_template_comes_along() -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    metadata = sentencepiece("llama") | {"tokenizer.chat_template": template}
    chat = [{"role": "user", "content": "dog"}]
    assert built(metadata).apply_chat_template(chat, tokenize=False) == "dog"
