"""The text that the embedded models are trained on: an invented closed world and small word tasks, random with a seed.

documents() gives plain statements ("The home of Mara is Tarsk.", "7 + 5 = 12."). The base models are trained on nothing else, so
they know the world but no questions, instructions or templates. rows() gives Alpaca rows that ask for the same knowledge.
Held-out rows ask about facts, sums and lists that are in no training row, so a right answer needs both the knowledge of the base
model and the format that fine-tuning teaches."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

PEOPLE = (
    "Mara Tobin Selka Orin Vesna Dorel Ilka Pavo Runa Kestor Lior Amsel Brisa Corvin Dunja Edric "
    "Fenna Galen Hesper Isolt Joran Kalia Lorcan Mirel Nadir Otto Petra Quill Rosalk Stellan Talia Ulric "
    "Velda Wystan Xenia Yorick"
).split()
CITIES = ("Lumora Vendal Tarsk Ostell Miravel Kandor Perrin Solvane Brennik Haldor Zemlin Quorra").split()
COUNTRIES = "Ruthia Casmere Nordal Estoria".split()
GOODS = "honey salt wool silk bread cheese wine paper copper pearls tea soap apples roses ink glue".split()
JOBS = "baker tailor sailor miller potter weaver farmer singer teacher doctor hunter painter".split()
COLOURS = "red blue green yellow black white grey brown".split()
OBJECTS = (
    "lamp cup chair table spoon plate clock mirror basket ladder hammer rope candle bottle pillow blanket carpet bell "
    "kite ball boat wheel bucket broom brush comb ring key lock box book pen map flag tent shoe hat coat glove vase"
).split()
MATERIALS = "wood glass iron stone leather clay cloth bone".split()
ANIMALS = (
    "fox owl bear wolf horse goat sheep duck goose crow hare mouse frog snake otter badger lynx deer swan ant".split()
)
FOODS = "grass fish seeds berries worms roots leaves eggs".split()
WORDS = OBJECTS + ANIMALS
NUMBERS = "zero one two three four five six".split()
NAMES = PEOPLE + CITIES + COUNTRIES + GOODS + JOBS + COLOURS + WORDS
NAMES += MATERIALS + FOODS


@dataclass(frozen=True)
class Relation:
    """The wordings of one kind of fact, in the corpus and in the rows. {s} is the subject, {v} the value."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact of the world, such as ("Mara", "home", "Tarsk")."""

    subject: str
    relation: str
    value: str


RELATIONS = {
    "home": Relation(
        ("{s} lives in {v}.", "The home of {s} is {v}.", "{s} has a house in the city of {v}.", "Home of {s}:\n {v}."),
        (
            "In which city does {s} live?",
            "Name the home of {s}.",
            "Where does {s} live?",
            "Which city is the home of {s}?",
        ),
    ),
    "job": Relation(
        ("{s} works as a {v}.", "The job of {s} is {v}.", "{s} is a {v} by trade.", "Job of {s}:\n {v}."),
        ("What is the job of {s}?", "Name the trade of {s}.", "As what does {s} work?", "Name the job of {s}."),
    ),
    "pet": Relation(
        ("{s} keeps a {v}.", "The pet of {s} is a {v}.", "{s} has a {v} as a pet.", "Pet of {s}:\n {v}."),
        ("Which animal does {s} keep?", "Name the pet of {s}.", "What is the pet of {s}?", "Which pet does {s} have?"),
    ),
    "country": Relation(
        ("{s} is a city in {v}.", "The country of {s} is {v}.", "{s} belongs to {v}.", "Country of {s}:\n {v}."),
        (
            "In which country is {s}?",
            "Name the country of {s}.",
            "To which country does {s} belong?",
            "What is the country of {s}?",
        ),
    ),
    "goods": Relation(
        (
            "{s} is famous for {v}.",
            "The markets of {s} sell {v}.",
            "The best goods of {s} are {v}.",
            "Goods of {s}:\n {v}.",
        ),
        (
            "For what is {s} famous?",
            "Name the best goods of {s}.",
            "What do the markets of {s} sell?",
            "Name what {s} is famous for.",
        ),
    ),
    "colour": Relation(
        (
            "The {s} is {v}.",
            "The colour of the {s} is {v}.",
            "The {s} has been painted {v}.",
            "Colour of the {s}:\n {v}.",
        ),
        (
            "What is the colour of the {s}?",
            "Name the colour of the {s}.",
            "In which colour is the {s}?",
            "Tell the colour of the {s}.",
        ),
    ),
    "material": Relation(
        (
            "The {s} is made of {v}.",
            "The material of the {s} is {v}.",
            "They made the {s} out of {v}.",
            "Material of the {s}:\n {v}.",
        ),
        (
            "Of what is the {s} made?",
            "Name the material of the {s}.",
            "What is the material of the {s}?",
            "Tell what the {s} is made of.",
        ),
    ),
    "food": Relation(
        ("The {s} eats {v}.", "The food of the {s} is {v}.", "The {s} feeds on {v}.", "Food of the {s}:\n {v}."),
        (
            "What does the {s} eat?",
            "Name the food of the {s}.",
            "On what does the {s} feed?",
            "Tell what the {s} eats.",
        ),
    ),
    "cities": Relation(
        (
            "The cities of {s} are {v}.",
            "The cities that belong to {s} are {v}.",
            "In {s} lie {v}.",
            "Cities of {s}:\n {v}.",
        ),
        (
            "List the cities of {s}.",
            "Which cities belong to {s}?",
            "Name the cities of {s}.",
            "Which cities lie in {s}?",
        ),
    ),
    "initial": Relation(
        (
            "The word {s} starts with {v}.",
            "The first letter of {s} is {v}.",
            "{s} has {v} as its first letter.",
            "First letter of {s}:\n {v}.",
        ),
        (
            "Name the first letter of {s}.",
            "With which letter does the word {s} start?",
            "What is the first letter of {s}?",
            "Give the first letter of the word {s}.",
        ),
    ),
    "sum": Relation(
        ("{s} = {v}.", "The sum {s} is {v}.", "Adding {s} gives {v}.", "Sum of {s}:\n {v}."),
        ("What is {s}?", "Add {s}.", "How much is {s}?", "Work out {s}."),
    ),
    "difference": Relation(
        ("{s} = {v}.", "The difference {s} is {v}.", "Taking {s} leaves {v}.", "Difference of {s}:\n {v}."),
        ("What is {s}?", "Take {s}.", "How much is {s}?", "Work out {s}."),
    ),
}


def world(seed):
    """All facts of the closed world, a list of Fact. Subjects and their order are fixed; the values depend on the seed."""
    draw = random.Random(f"world {seed}")

    def deal(relation, subjects, values):
        """Facts with random values, in which the values occur equally often, up to a difference of one."""
        values = list(values)
        dealt = [values[i % len(values)] for i in range(len(subjects))]
        draw.shuffle(dealt)
        return [Fact(subject, relation, value) for subject, value in zip(subjects, dealt, strict=True)]

    def groups(relation, facts):
        """The inverse facts: for each value, its subjects in alphabetical order."""
        members = {}
        for fact in facts:
            members.setdefault(fact.value, []).append(fact.subject)
        return [Fact(value, relation, ", ".join(sorted(names))) for value, names in sorted(members.items())]

    home, country = deal("home", PEOPLE, CITIES), deal("country", CITIES, COUNTRIES)
    facts = home + country
    facts += deal("job", PEOPLE, JOBS) + deal("pet", PEOPLE, ANIMALS)
    facts += deal("goods", CITIES, GOODS)
    facts += deal("colour", OBJECTS, COLOURS) + deal("material", OBJECTS, MATERIALS)
    facts += deal("food", ANIMALS, FOODS)
    facts += groups("cities", country)
    facts += [Fact(word, "initial", word[0]) for word in WORDS]
    facts += [Fact(f"{a} + {b}", "sum", str(a + b)) for a in range(10) for b in range(10)]
    facts += [Fact(f"{a} - {b}", "difference", str(a - b)) for a in range(10) for b in range(a + 1)]
    return facts


@dataclass(frozen=True)
class Task:
    """A task whose answer can be found in its own text.

    draw: function from a random.Random to the fields of the strings, among them `input` and `answer`. If an instruction contains
    {input}, the input of the row is empty. share: frequency in the corpus, relative to the other tasks."""

    draw: Callable
    statements: tuple[str, ...]
    instructions: tuple[str, ...]
    share: int = 1


def draw_list(draw, low=3, high=4):
    words = draw.sample(WORDS, draw.randint(low, high))
    return words, ", ".join(words)


def draw_first(draw):
    words, text = draw_list(draw)
    return {"input": text, "answer": words[0]}


def draw_last(draw):
    words, text = draw_list(draw)
    return {"input": text, "answer": words[-1]}


def draw_joined(draw):
    words, text = draw_list(draw, 3, 3)
    return {"input": " ".join(words), "answer": text}


def draw_repeated(draw):
    word, times = draw.choice(WORDS), draw.randint(2, 4)
    return {"input": word, "n": NUMBERS[times], "answer": " ".join([word] * times)}


def draw_sequence(draw):
    a, n = draw.randint(0, 20), draw.randint(3, 5)
    step = draw.choice((1, -1)) if a >= 5 else 1
    numbers = [str(a + i * step) for i in range(n)]
    return {"first": numbers[0], "final": numbers[-1], "input": "", "answer": ", ".join(numbers)}


TASKS = {
    "first": Task(
        draw_first,
        (
            "The first word of {input} is {answer}.",
            "In the list {input} the first word is {answer}.",
            "First word of a list.\n{input}\n {answer}.",
            "{input}: the first word is {answer}.",
        ),
        ("Give the first word of the list.", "Which word comes first in {input}"),
    ),
    "last": Task(
        draw_last,
        (
            "The last word of {input} is {answer}.",
            "In the list {input} the last word is {answer}.",
            "Last word of a list.\n{input}\n {answer}.",
            "{input}: the last word is {answer}.",
        ),
        ("Give the last word of the list.", "Which word comes last in {input}"),
    ),
    "sequence": Task(
        draw_sequence,
        (
            "The numbers from {first} to {final} are {answer}.",
            "Counting from {first} to {final} gives {answer}.",
            "Numbers from {first} to {final}:\n {answer}.",
            "From {first} to {final}: {answer}.",
        ),
        ("Count from {first} to {final}.", "List the numbers from {first} to {final}."),
        share=2,
    ),
    "join": Task(
        draw_joined,
        (
            "The words {input} with commas are {answer}.",
            "Joined with commas, {input} becomes {answer}.",
            "Words with commas.\n{input}\n {answer}.",
            "{input}: with commas {answer}.",
        ),
        ("Write the words with commas.", "Join with commas: {input}"),
    ),
    "repeat": Task(
        draw_repeated,
        (
            "The word {input} {n} times is {answer}.",
            "Written {n} times, {input} becomes {answer}.",
            "A word {n} times.\n{input}\n {answer}.",
            "{input}: {n} times {answer}.",
        ),
        ("Write the word {n} times.", "Repeat {n} times: {input}"),
    ),
}


def documents(seed, count, stream=0):
    """Yields `count` documents, each of four to seven statements separated by spaces or by newlines.

    Half of the statements are facts of world(seed), half are tasks. Another `stream` gives other documents about the same
    world."""
    facts = world(seed)
    draw = random.Random(f"documents {seed} {stream}")
    tasks = [task for task in TASKS.values() for _ in range(task.share)]
    for _ in range(count):
        statements = []
        for _ in range(draw.randint(4, 7)):
            if draw.random() < 0.5:
                task = draw.choice(tasks)
                statements.append(draw.choice(task.statements).format(**task.draw(draw)))
            else:
                fact = draw.choice(facts)
                statements.append(draw.choice(RELATIONS[fact.relation].statements).format(s=fact.subject, v=fact.value))
        yield draw.choice((" ", "\n")).join(statements)


def rows(seed, task_rows=100, held_out=0.1):
    """(train, test), each a shuffled list of (name of the relation or task, Alpaca row).

    held_out: share of the facts and tasks in the test rows. A fact is held out with all its wordings: two wordings of a
    held-out fact are in the test rows, three wordings of another fact in the training rows. Each task has `task_rows` rows
    with different texts. A row is {"instruction", "input", "output"}, and no (instruction, input) is in both parts. An output
    begins with a space, as words in the corpus do, so that its tokens after "### Response:\\n" are those that the base model
    has learned."""
    draw = random.Random(f"rows {seed}")
    train, test = [], []
    by_relation = {}
    for fact in world(seed):
        by_relation.setdefault(fact.relation, []).append(fact)
    for relation, facts in by_relation.items():
        for i, fact in enumerate(draw.sample(facts, len(facts))):
            held = i < round(len(facts) * held_out)
            for question in draw.sample(RELATIONS[relation].questions, 2 if held else 3):
                row = {"instruction": question.format(s=fact.subject), "input": "", "output": f" {fact.value}"}
                (test if held else train).append((relation, row))
    for name, task in TASKS.items():
        texts = set()
        for drawn in itertools.count():
            if len(texts) == task_rows:
                break
            if drawn == 100 * task_rows:
                raise ValueError(f"task {name!r} has fewer than {task_rows} different texts")
            fields = task.draw(draw)
            text = fields["input"], fields["answer"], fields.get("n")
            if text not in texts:
                instruction = draw.choice(task.instructions)
                row = {
                    "instruction": instruction.format(**fields),
                    "input": "" if "{input}" in instruction or not fields["input"] else fields["input"],
                    "output": f" {fields['answer']}",
                }
                (test if len(texts) < 2 * task_rows * held_out else train).append((name, row))
                texts.add(text)
    draw.shuffle(train)
    draw.shuffle(test)
    return train, test
