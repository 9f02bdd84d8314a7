"""The corpus: which documents in which order, its hash, and its words.

    python3 corpus.py            writes build/corpus.jsonl and prints its SHA-256
    python3 corpus.py --words    writes ../words.txt, the words of the corpus
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

from dialogues import END, END_OF_DOCUMENT, PAD, START, DocumentWriter
from stories import Names

HERE = Path(__file__).parent
DEFAULT_SEED = 1
# Names come in gradually: documents, and names a gender (None: all). With all of them from the start
# the model does not learn to copy a name within 1,800 steps.
CURRICULUM = ((6_000, 1), (6_000, 3), (8_000, 8), (80_000, None))


def documents(seed=DEFAULT_SEED, curriculum=CURRICULUM):
    """The documents of the corpus, one after the other."""
    writer = DocumentWriter(seed)
    for count, names in curriculum:
        writer.names = Names.all() if names is None else Names.few(names)
        for _ in range(count):
            yield writer.document()


def sample(seed, count):
    """Documents with all names: for the tokenizer and for validation."""
    return list(documents(seed, ((count, None),)))


def write(path, seed=DEFAULT_SEED):
    """Writes one JSON string a line and returns the SHA-256 of the file."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for document in documents(seed):
            line = (json.dumps(document) + "\n").encode()
            digest.update(line)
            file.write(line)
    return digest.hexdigest()


def words(seed=DEFAULT_SEED):
    """Every word of the corpus in lower case, sorted. Apostrophes belong to a word."""
    control = re.compile("|".join(map(re.escape, (START, END, END_OF_DOCUMENT, PAD))))
    found = set()
    for document in documents(seed):
        found.update(re.findall(r"[a-z]+(?:'[a-z]+)*", control.sub(" ", document).lower()))
    return sorted(found)


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--out", type=Path, default=HERE / "build" / "corpus.jsonl")
    parser.add_argument("--words", action="store_true", help="write the word list instead")
    options = parser.parse_args()
    if options.words:
        path = HERE.parent / "words.txt"
        found = words(options.seed)
        path.write_text("\n".join(found) + "\n", encoding="utf-8")
        print(f"{len(found)} words in {path.name}")
    else:
        print(f"sha256 {write(options.out, options.seed)}")


if __name__ == "__main__":
    main()
