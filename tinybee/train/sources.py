"""Reads the files of `data/`: the world, the stories, the facts."""

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"


def _lines(name):
    """The lines of a data file without its comments."""
    text = (DATA / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def _sections(name):
    """Lines by `== section`, in the order of the file."""
    sections = {}
    for line in _lines(name):
        if line.startswith("== "):
            current = sections.setdefault(line[3:], [])
        elif sections:
            current.append(line)
    return sections


def load_world():
    """Animals, names, places, things: see `world.json`."""
    return json.loads((DATA / "world.json").read_text(encoding="utf-8"))


def load_answers(name):
    """Pairs of question forms and their one answer."""
    answers = []
    for line in _lines(name):
        questions, answer = line.split(" => ")
        answers.append((questions.split(" ~ "), answer.replace("\\n", "\n")))
    return answers


def load_unknown():
    """Question forms, topics and answers about what the model does not know."""
    sections = _sections("unknown.txt")
    return {name: [line for line in lines if line] for name, lines in sections.items()}


def load_stories():
    """The opening beats, and for each plot what it is about and its beats."""
    plots = {}
    for name, lines in _sections("stories.txt").items():
        prefix = "about: "
        about = [line[len(prefix):] for line in lines if line.startswith(prefix)]
        beats = [[]]
        for line in lines:
            if line.startswith(prefix):
                continue
            if line:
                beats[-1].append(line)
            elif beats[-1]:
                beats.append([])
        plots[name] = {"about": about, "beats": [beat for beat in beats if beat]}
    opening = plots.pop("intro")["beats"]
    return opening, plots
