"""The tokenizer: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) trained once on the corpus itself."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
# Every byte has a token, so that any text can be encoded, and so have the two marks.
VOCAB_SIZE_MIN = 256 + 2


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; the same documents in the same order give the same one.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the two marks.
    """
    if vocab_size < VOCAB_SIZE_MIN:
        raise ValueError(
            f"model.vocab_size = {vocab_size}: a byte-level tokenizer needs {VOCAB_SIZE_MIN} at least; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    tokenizer.encode_special_tokens = True  # a document that spells a mark out has not written one
    return tokenizer
