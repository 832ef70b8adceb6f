"""Small tokenizers of the kinds that checkpoints bring along."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "I have 5 cats and 3 dogs. My cats love to play with my dogs and cats.",
    "Grüße aus Köln: café, café 😀😀 und 東京!",
    "def f(x):\n    return x\n\n\n",
]


def sentencepiece(*, bos: bool = True, eos: bool = False) -> LlamaTokenizer:
    """Return a tokenizer that puts a space before a text, and has bytes for what it lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "s", "d", "o", "g", "a", "n", "c", "t", "\n", "é"]
    merges = ["▁ d", "▁d o", "▁do g", "▁ s", "▁dog s", "▁ a", "a n", "▁a n", "▁an d", "▁ ▁"]
    merges += ["▁ c", "▁c a", "▁ca t", "▁cat s"]
    pieces += ["".join(merge.split()) for merge in merges]
    return LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge.split()) for merge in merges],
        add_bos_token=bos,
        add_eos_token=eos,
    )


def byte_level(
    template: str = "<s> $A", *, trim_offsets: bool = False, prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """Return a tokenizer over bytes, with what the template puts around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # Not special, and another token's text.
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    around = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in special]
    )
    tokenizer.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
        if trim_offsets
        else around
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "byte level": byte_level,
    "appends EOS": lambda: byte_level("<s> $A </s>"),
    "trims offsets": lambda: byte_level(trim_offsets=True),
    "byte level, prefix space": lambda: byte_level(trim_offsets=True, prefix_space=True),
    "sentencepiece": sentencepiece,
    "sentencepiece, appends EOS": lambda: sentencepiece(eos=True),
    "sentencepiece without BOS": lambda: sentencepiece(bos=False),
}
