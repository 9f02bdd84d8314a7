"""Writes little stories from plots.

Every choice is a draw from one seeded generator, so the order of the draws is part of the corpus:
reordering two lines that draw changes every document after them.
"""

import random
import re

from sources import load_stories, load_world

WORLD = load_world()
OPENING, PLOTS = load_stories()

PRONOUNS = {"female": ("she", "her", "her"), "male": ("he", "him", "his")}
CHILD_HOMES = [
    "in a small house in the village",
    "in a white house by the sea",
    "in a little house near the forest",
    "in a big city",
    "on a farm on the hill",
]
# Names of children that animals may have too.
SHARED_NAMES = 6
PARAGRAPH_OPENERS = "One |Then |At last|In the |Together|Suddenly|The next|After|From "
SECOND_PLOT = [
    "A few days later, something new happened.",
    "But that was not the end of it.",
    "Then winter came and went.",
    "Some time later, there was a new adventure.",
    "Now listen to what happened next.",
]
# Slots that a second plot with the same characters draws anew.
SECOND_PLOT_SLOTS = (
    "item", "item2", "place", "placeline", "col", "col2", "food2", "thing", "skill", "sad", "glad",
)
ABOUT = [
    "a {kind}",
    "a {kind}",
    "a {trait} {kind}",
    "{N} the {kind}",
    "a {kind} named {N}",
    "a {kind} and a {fkind}",
    "a {trait} {kind} named {N}",
]
REQUESTS = [
    "Write a story about {a}.",
    "Tell me a story about {a}.",
    "Write a story about {a}",
    "Write a short story about {a}.",
    "Tell me a short story about {a}",
    "Can you tell me a story about {a}?",
    "Please write a story about {a}.",
    "I would like a story about {a}.",
    "A story about {a}, please.",
    "Tell a story about {a}.",
    "Could you write a little story about {a}?",
    "Make up a story about {a}.",
]
PLAIN_REQUESTS = [
    "Tell me a story.",
    "Write a story.",
    "Tell me a story",
    "Write me a short story.",
    "Can you tell me a story?",
    "I want to hear a story.",
    "Please tell me a bedtime story.",
]


class Names:
    """The names in use. The name curriculum starts with few of them."""

    def __init__(self, girls, boys, female_animals, male_animals):
        self.girls = girls
        self.boys = boys
        self.female_animals = female_animals
        self.male_animals = male_animals

    @classmethod
    def all(cls):
        """Every name of the world."""
        return cls(
            WORLD["girls"], WORLD["boys"], WORLD["female_animals"], WORLD["male_animals"]
        )

    @classmethod
    def few(cls, count):
        """`count` names a gender, the same for children and animals."""
        female = WORLD["female_animals"][:count]
        male = WORLD["male_animals"][:count]
        return cls(female, male, female, male)


def with_articles(text):
    """`a owl` becomes `an owl`."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)


class StoryWriter:
    """Stories and requests for them."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.names = Names.all()

    def choose(self, options):
        """One of the options."""
        return self.random.choice(options)

    def chance(self, probability):
        """True with this probability."""
        return self.random.random() < probability

    def expand(self, text, slots):
        """Chooses between `[a|b]`, innermost first, then fills in `{slots}`."""
        while match := re.search(r"\[([^\[\]]*)\]", text):
            chosen = self.choose(match.group(1).split("|"))
            text = text[: match.start()] + chosen + text[match.end():]
        for _ in range(3):  # a slot may hold slots
            if "{" not in text:
                break
            text = re.sub(r"\{(\w+)\}", lambda match: slots[match.group(1)], text)
            if "[" in text:
                text = self.expand(text, slots)
        return text

    def hero(self):
        """Kind, gender, name, home and favourite food of a character."""
        if self.chance(0.22):
            kind = self.choose(list(WORLD["children"]))
            gender = WORLD["children"][kind]
            name = self.choose(self.names.girls if gender == "female" else self.names.boys)
            home = self.choose(CHILD_HOMES)
            return kind, gender, name, home, self.choose(WORLD["foods"])
        kind = self.choose(list(WORLD["animals"]))
        gender = self.choose(["female", "male"])
        if gender == "female":
            name = self.choose(self.names.female_animals + self.names.girls[:SHARED_NAMES])
        else:
            name = self.choose(self.names.male_animals + self.names.boys[:SHARED_NAMES])
        animal = WORLD["animals"][kind]
        return kind, gender, name, animal["home"], animal["food"]

    def cast(self):
        """The slots of one story: a hero, a friend of another kind and name, and their world."""
        kind, gender, name, home, food = self.hero()
        while True:
            friend_kind, friend_gender, friend_name, _, _ = self.hero()
            if friend_kind != kind and friend_name != name:
                break
        he, him, his = PRONOUNS[gender]
        friend_he, friend_him, friend_his = PRONOUNS[friend_gender]
        item, item2 = self.random.sample(WORLD["items"], 2)
        place = self.choose(list(WORLD["places"]))
        trait, friend_trait = self.random.sample(list(WORLD["traits"]), 2)
        return {
            "kind": kind, "N": name, "home": home, "food": food,
            "Home": home[0].upper() + home[1:],
            "he": he, "him": him, "his": his, "He": he.title(), "His": his.title(),
            "fkind": friend_kind, "F": friend_name, "ftrait": friend_trait,
            "fhe": friend_he, "fhim": friend_him, "fhis": friend_his, "FHe": friend_he.title(),
            "item": item, "item2": item2,
            "place": place, "placeline": WORLD["places"][place], "near_place": "near the " + place,
            "trait": trait, "traitline": WORLD["traits"][trait],
            "in_home": "in the family", "skip": "",
            "col": self.choose(WORLD["colours"]),
            "col2": self.choose(WORLD["colours"]),
            "sad": self.choose(WORLD["sad"]),
            "glad": self.choose(WORLD["glad"]),
            "glad2": self.choose(["happily", "with a smile", "with a song"]),
            "food2": self.choose(WORLD["foods"]),
            "thing": self.choose(WORLD["things_to_build"]),
            "skill": self.choose(WORLD["skills"]),
        }

    def beats(self, plot, slots, introduce_friend):
        """One sentence or two for each beat of a plot.

        The first mention of the friend says what the friend is: `Pip the crow`.
        """
        written = []
        for beat in PLOTS[plot]["beats"]:
            text = self.expand(self.choose(beat), slots)
            friend = re.search(r"\b" + slots["F"] + r"\b", text)
            if introduce_friend and friend:
                introduce_friend = False
                if not re.search(r"\b" + slots["fkind"] + r"\b", text):
                    text = f"{text[:friend.end()]} the {slots['fkind']}{text[friend.end():]}"
            written.append(text)
        return written

    def story(self, two_plots=None):
        """A story, the slots it was written with and its plots."""
        slots = self.cast()
        plot = self.choose(list(PLOTS))
        if plot == "lost":
            slots["icol"], slots["iitem"] = slots["col"], slots["item"]
        else:
            slots["icol"] = self.choose(WORLD["colours"])
            taken = (slots["item"], slots["item2"])
            slots["iitem"] = self.choose([item for item in WORLD["items"] if item not in taken])
        parts = [self.expand(self.choose(beat), slots) for beat in OPENING]
        parts += self.beats(plot, slots, introduce_friend=True)
        if two_plots is None:
            two_plots = self.chance(0.12)
        plots = [plot]
        ending = self.choose(WORLD["endings"])
        if two_plots:
            second = self.choose([name for name in PLOTS if name != plot])
            plots.append(second)
            fresh = self.cast()
            later = {**slots, **{slot: fresh[slot] for slot in SECOND_PLOT_SLOTS}}
            beats = self.beats(second, later, introduce_friend=False)
            parts.append("\n\n" + self.choose(SECOND_PLOT))
            parts += beats
        parts.append(ending)
        text = " ".join(part for part in parts if part).replace(" \n\n", "\n\n")
        if self.chance(0.3):
            paragraphs = re.split(rf"(?<=[.!?\"]) (?={PARAGRAPH_OPENERS})", text)
            if len(paragraphs) < 7:
                text = "\n\n".join(paragraphs)
        return with_articles(text), slots, plots

    def request(self, slots, plot):
        """What somebody asks to get this story."""
        about = self.expand(self.choose(ABOUT + PLOTS[plot]["about"] * 2), slots)
        text = self.choose(REQUESTS).replace("{a}", about)
        if self.chance(0.08):
            text = self.choose(PLAIN_REQUESTS)
        return with_articles(text)
