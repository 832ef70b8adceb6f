"""The demo model's tokenizer: byte-level BPE as in LLaMA-3, whole words for the corpus."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from demo_model import corpus

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"


def build(context: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the corpus' vocabulary.

    Every word of the corpus is one token, with or without a space before it (a space is put
    before the text, so that "dogs" and " dogs" encode alike). Other UTF-8 text falls apart into
    bytes.

    Parameters
    ----------
    context
        Longest text, in tokens, that the model is made for.
    """
    pieces = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # A sign such as "." follows its word directly; a word follows a space, which is written "Ġ".
    pieces += [f"Ġ{word}" for word in corpus.vocabulary() if word.isalnum()]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # As in LLaMA-3, a word of the vocabulary is taken whole, whatever the merges say; that makes
    # merges, and the hundreds of half words that they pass through, needless here.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into `folder`."""
    tokenizer.save_pretrained(folder)
    # The name that every release of transformers knows; current ones write one of their own.
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
