"""Makes the model folder from nothing: corpus, tokenizer, training, export.

    python3 make.py                       about 15 minutes on two cores; writes build/model
    python3 make.py --steps 20 --no-compile     a smoke test
"""

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

import corpus
import evaluate
import tokenizer as bpe
import train

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "model"
# Files that are written by hand.
KEPT = ("generation_config.json", "tokenizer_config.json", "README.md")
TOKENIZER_SEED, TOKENIZER_DOCUMENTS = 2, 20_000
HELD_OUT_SEED, HELD_OUT_DOCUMENTS = 3, 700


def load_documents(seed, build):
    """Writes the corpus, prints its hash and reads it back."""
    path = build / "corpus.jsonl"
    print(f"corpus sha256 {corpus.write(path, seed)}", flush=True)
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=corpus.DEFAULT_SEED)
    parser.add_argument("--steps", type=int, default=train.Recipe.steps)
    parser.add_argument("--build", type=Path, default=HERE / "build")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--new-tokenizer", action="store_true", help="train one instead of taking the shipped one")
    options = parser.parse_args()

    documents = load_documents(options.seed, options.build)
    if options.new_tokenizer:
        tokenizer = bpe.train(corpus.sample(TOKENIZER_SEED, TOKENIZER_DOCUMENTS))
    else:
        tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(documents)]
    held_out = corpus.sample(HELD_OUT_SEED, HELD_OUT_DOCUMENTS)
    held_out = [encoding.ids for encoding in tokenizer.encode_batch(held_out)]
    print(f"{sum(map(len, ids)) / 1e6:.1f} M tokens in {len(ids)} documents", flush=True)

    recipe = train.Recipe(steps=options.steps, seed=options.seed, compile=not options.no_compile)
    model = train.train(recipe, ids, held_out)
    folder = options.build / "model"
    model.export(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in KEPT:
        shutil.copy(SHIPPED / name, folder / name)
    evaluate.report(model, tokenizer)
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
