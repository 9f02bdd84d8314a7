"""The byte-level BPE tokenizer of 2,048 entries."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dialogues import END, END_OF_DOCUMENT, PAD, START

# In the order of their ids, from 0.
SPECIAL_TOKENS = [END_OF_DOCUMENT, START, END, PAD]
VOCABULARY = 2048


def train(documents):
    """A tokenizer for these documents; control tokens in them are not learned from."""
    control = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    tokenizer.train_from_iterator((control.sub("\n", text) for text in documents), trainer)
    return tokenizer
