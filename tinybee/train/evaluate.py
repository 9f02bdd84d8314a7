"""How good a trained model is: facts it answers word for word, and names it keeps in a story."""

import random

import torch

from corpus import sample
from dialogues import ABOUT_ITSELF, END, FACTS, START
from stories import Names

PAD_ID = 3
BATCH = 64
STORY_SEED, STORY_DOCUMENTS, STORIES = 3, 700, 96


@torch.no_grad()
def predictions(model, rows):
    """The likeliest next token at every position of each row."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), PAD_ID)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return model.logits(tokens).argmax(-1).tolist()


def facts_right(model, tokenizer):
    """The share of facts whose whole answer is the likeliest one, token by token."""
    pairs = []
    for index, (questions, answer) in enumerate(FACTS + ABOUT_ITSELF):
        question = random.Random(index).choice(questions)
        prompt = f"{START}user\n{question}{END}\n{START}assistant\n"
        pairs.append((tokenizer.encode(prompt).ids, tokenizer.encode(answer + END).ids))
    right = 0
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start:start + BATCH]
        for (prompt, answer), said in zip(batch, predictions(model, [p + a for p, a in batch])):
            right += said[len(prompt) - 1:len(prompt) + len(answer) - 1] == answer
    return right / len(pairs)


def names_kept(model, tokenizer):
    """The share of repeated names in held-out stories that are the likeliest token there."""
    names = Names.all()
    everyone = {*names.girls, *names.boys, *names.female_animals, *names.male_animals}
    encoded = [tokenizer.encode(" " + name).ids for name in sorted(everyone)]
    name_ids = {ids[0] for ids in encoded if len(ids) == 1}
    start_id = tokenizer.token_to_id(START)
    documents = (tokenizer.encode(text).ids for text in sample(STORY_SEED, STORY_DOCUMENTS))
    stories = [ids for ids in documents if 80 < len(ids) < 256 and ids[0] != start_id][:STORIES]
    right = repeated = 0
    for ids, said in zip(stories, predictions(model, stories)):
        seen = set()
        for position, token in enumerate(ids):
            if token in name_ids:
                if token in seen:
                    repeated += 1
                    right += said[position - 1] == token
                seen.add(token)
    return right / max(1, repeated)


def report(model, tokenizer):
    """Prints both."""
    print(f"facts word for word: {facts_right(model, tokenizer):.1%}")
    print(f"repeated names: {names_kept(model, tokenizer):.1%}")
