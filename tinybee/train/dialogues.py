"""Writes documents: chats in the ChatML form and plain text.

As in `stories.py` the order of the draws is part of the corpus.
"""

from sources import load_answers, load_unknown
from stories import WORLD, StoryWriter, with_articles

START, END, END_OF_DOCUMENT, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"

FACTS = load_answers("facts.txt")
ABOUT_ITSELF = load_answers("about_itself.txt")
UNKNOWN = load_unknown()

LIST_REQUESTS = ["Name {n} {k}.", "Tell me {n} {k}.", "Can you name {n} {k}?", "Give me {n} {k}.", "List {n} {k}."]
REPEAT_REQUESTS = ["Say: ", "Repeat: ", "Repeat after me: ", "Please repeat: ", "Say this: ", "Echo: "]
OPENINGS = ["Once upon a time", "Once upon a time,", "Once upon a time..."]
INTRODUCTIONS = [
    "Hello, my name is {n}. I live in a {p}.",
    "Hello, world! My name is {n}.",
    "Hello! My name is {n}, and I like {f}.",
    "The quick brown fox jumps over the lazy dog.",
    "My name is {n}. I am a {k}.",
]
HOMES = ["village", "city", "small house", "farm"]
PEOPLE = ["girl", "boy", "teacher", "baker", "farmer", "pilot"]


class DocumentWriter(StoryWriter):
    """Documents of every kind; a turn is a pair of question and answer."""

    def children(self):
        """The names of girls and boys in use."""
        return self.names.girls + self.names.boys

    def noise(self, question):
        """The ways in which people ask carelessly or politely."""
        draw = self.random.random()
        if draw < 0.10:
            return question.lower()
        if draw < 0.16:
            return question.rstrip(".?!")
        if draw < 0.20:
            return question.lower().rstrip(".?!")
        if draw < 0.24:
            return "Please tell me: " + question
        if draw < 0.28:
            return self.choose(["Hi! ", "Hello! ", "Hey, ", "Hello, tinybee. "]) + question
        if draw < 0.31:
            if question.endswith("."):
                return question + " Please."
            return question + self.choose([" Thanks.", " Please answer."])
        if draw < 0.33:
            return "Question: " + question
        return question

    def arithmetic(self):
        """A small sum, difference, product or comparison."""
        draw = self.random.random()
        if draw < 0.5:
            a, b = self.random.randint(0, 12), self.random.randint(0, 12)
            formula, words, result = f"{a} + {b}", f"{a} plus {b}", a + b
        elif draw < 0.78:
            a = self.random.randint(0, 15)
            b = self.random.randint(0, a)
            formula, words, result = f"{a} - {b}", f"{a} minus {b}", a - b
        elif draw < 0.93:
            a, b = self.random.randint(0, 10), self.random.randint(0, 10)
            formula, words, result = f"{a} x {b}", f"{a} times {b}", a * b
        else:
            a, b = self.random.sample(range(0, 21), 2)
            question = self.choose([
                f"Which is bigger, {a} or {b}?",
                f"What is bigger: {a} or {b}?",
                f"Is {a} or {b} the bigger number?",
            ])
            return question, f"{max(a, b)} is bigger than {min(a, b)}."
        question = self.choose([
            f"What is {formula}?",
            f"What is {words}?",
            f"How much is {formula}?",
            f"{formula} =",
            formula,
            f"What's {formula}?",
            f"How much is {words}?",
            f"What is {formula.replace(' ', '')}?",
        ])
        return question, f"{formula} = {result}."

    def enumeration(self):
        """Two to four things of a kind."""
        kind = self.choose(list(WORLD["lists"]))
        members = WORLD["lists"][kind]
        wanted = self.random.choice([2, 3, 3, 3, 4])
        chosen = self.random.sample(members, min(wanted, len(members)))
        text = ", ".join(chosen[:-1]) + " and " + chosen[-1]
        request = self.choose(LIST_REQUESTS).format(n=WORLD["numbers"][len(chosen)], k=kind)
        return request, text[0].upper() + text[1:] + "."

    def repetition(self):
        """A request to say something, and it said."""
        words = [
            self.choose(
                list(WORLD["animals"]) + WORLD["items"] + WORLD["colours"] + list(WORLD["traits"])
                + list(WORLD["places"]) + self.children() + ["the", "and", "a", "is", "in"]
            )
            for _ in range(self.random.randint(1, 5))
        ]
        text = " ".join(words)
        text = text[0].upper() + text[1:] + self.choose([".", "!", ""])
        return self.choose(REPEAT_REQUESTS) + text, text

    def unknown(self):
        """A question that is too hard."""
        x, y = self.random.sample(UNKNOWN["topics"], 2)
        question = self.choose(UNKNOWN["questions"]).replace("{x}", x).replace("{y}", y)
        return question, self.choose(UNKNOWN["answers"])

    def fact(self):
        """A question about the world, or the beginning of its answer to be finished."""
        questions, answer = self.choose(FACTS)
        if self.chance(0.06) and len(answer.split()) > 3:
            words = answer.split()
            kept = self.random.randint((len(words) + 1) // 2, len(words) - 1)
            return " ".join(words[:kept]), answer
        return self.noise(self.choose(questions)), answer

    def about_itself(self):
        """A question about the model, or small talk."""
        questions, answer = self.choose(ABOUT_ITSELF)
        if self.chance(0.8):
            return self.choose(questions), answer
        return self.noise(self.choose(questions)), answer

    def turn(self):
        """One turn of any kind."""
        draw = self.random.random()
        if draw < 0.52:
            return self.fact()
        if draw < 0.66:
            question, answer = self.arithmetic()
            return (self.noise(question) if self.chance(0.3) else question), answer
        if draw < 0.77:
            return self.about_itself()
        if draw < 0.81:
            return self.enumeration()
        if draw < 0.88:
            return self.repetition()
        if draw < 0.94:
            return self.unknown()
        return self.story_turn()

    def story_turn(self):
        """A request for a story and the story; sometimes only its first words."""
        text, slots, plots = self.story()
        if self.chance(0.07):
            if self.chance(0.6):
                question = " ".join(text.split()[: self.choose([4, 4, 4, 6, 8, 10])])
            else:
                question = self.choose(OPENINGS)
            if not question.startswith(OPENINGS[0]) or text.startswith(OPENINGS[0]):
                return question, text
        plot = plots[-1] if self.chance(0.1) else plots[0]
        return self.request(slots, plot), text

    def memory(self):
        """Something is told, and asked for some turns later."""
        name = self.choose(self.children())
        colour = self.choose(WORLD["colours"])
        animal = self.choose(list(WORLD["animals"]))
        food = self.choose(WORLD["foods"])
        told, reply, asked, answer = self.choose([
            (
                (f"My name is {name}.", f"I am {name}.", f"Hello, I am {name}.", f"Hi! My name is {name}."),
                f"Hello, {name}! How can I help you?",
                ("What is my name?", "Do you remember my name?", "Who am I?"),
                f"Your name is {name}.",
            ),
            (
                (f"My favourite colour is {colour}.", f"I like the colour {colour}."),
                f"{colour.capitalize()} is a nice colour.",
                ("What is my favourite colour?", "Which colour do I like?"),
                f"Your favourite colour is {colour}.",
            ),
            (
                (f"I have a {animal}.", f"I have a little {animal}."),
                with_articles(f"A {animal} is a nice animal."),
                ("What animal do I have?", "Which animal do I have?"),
                with_articles(f"You have a {animal}."),
            ),
            (
                (f"I like {food}.", f"I love {food}."),
                f"I have heard that {food} {'are' if food.endswith('s') else 'is'} very good.",
                ("What do I like?", "What do I love to eat?"),
                f"You like {food}.",
            ),
        ])
        turns = [(with_articles(self.choose(told)), reply)]
        for _ in range(self.random.choice([0, 0, 1, 2])):
            if self.chance(0.8):
                turns.append(self.turn())
        turns.append((self.choose(asked), answer))
        return turns

    def story_questions(self):
        """A story and questions about it."""
        text, slots, plots = self.story(two_plots=False)
        kind, name = slots["kind"], slots["N"]
        turns = [(self.request(slots, plots[0]), text)]
        asked = self.choose([f"What was the name of the {kind}?", f"Who was the {kind}?"])
        self.choose([None])  # a question that was dropped; its draw stays, or the corpus changes
        is_child = kind in WORLD["children"]
        questions = [
            (asked, f"The name of the {kind} was {name}."),
            ("What was the story about?", with_articles(f"It was about a {kind} named {name}.")),
            (
                f"Who was {name}?" if is_child else f"What kind of animal was {name}?",
                with_articles(f"{name} was a {kind}."),
            ),
        ]
        self.random.shuffle(questions)
        return turns + questions[: self.random.choice([1, 1, 2])]

    def chat(self):
        """A whole chat."""
        draw = self.random.random()
        if draw < 0.12:
            turns = self.memory()
        elif draw < 0.18:
            turns = self.story_questions()
        elif draw < 0.36:
            turns = [self.story_turn()]
        else:
            short = self.chance(0.97)
            count = self.random.choice([1, 2, 3, 4, 6, 8]) if short else self.random.randint(10, 30)
            turns = [self.turn() for _ in range(count)]
        if self.chance(0.06):
            turns.append((self.choose(["Thank you!", "Thanks."]), "You are welcome!"))
        text = ""
        if self.chance(0.3):
            text += f"{START}system\n{self.choose(WORLD['system_prompts'])}{END}\n"
        for question, answer in turns:
            text += f"{START}user\n{question}{END}\n{START}assistant\n{answer}{END}\n"
        return text

    def plain_text(self):
        """A story, some facts, numbers or an introduction."""
        draw = self.random.random()
        if draw < 0.86:
            return self.story()[0]
        if draw < 0.94:
            return " ".join(self.choose(FACTS)[1] for _ in range(self.random.randint(1, 4)))
        if draw < 0.97:
            first = self.random.randint(0, 20)
            return " ".join(str(first + i) for i in range(self.random.randint(5, 20)))
        return self.choose(INTRODUCTIONS).format(
            n=self.choose(self.children()),
            p=self.choose(HOMES),
            f=self.choose(WORLD["foods"]),
            k=self.choose(PEOPLE),
        )

    def document(self):
        """One document with its end token."""
        text = self.plain_text() if self.chance(0.26) else self.chat()
        return text + END_OF_DOCUMENT
