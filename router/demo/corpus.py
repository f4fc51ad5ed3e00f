"""The training text of Quire's demo model, written from seeded grammars.

Nothing is downloaded and nothing is copied: every sentence comes from the lists in `words.py`, `plots.py` and
`quire_facts.py` and from the templates below. The same seed gives the same text.

    python corpus.py --documents 20        # prints a sample

A document is a list of parts `(text, learned)`. Only learned parts (what the assistant says, and plain text) count in
the loss; what a user says is context.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import plots
import quire_facts
import words

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TOOL = ("<|tool_call|>", "<|tool_result|>")
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, *FIM, *TOOL] + [f"<|reserved_{i}|>" for i in range(8)]

Document = list[tuple[str, bool]]
Turn = tuple[str, str]  # (what the user says, what the assistant answers)
Rng = random.Random

HIGHEST = 99  # the largest operand of a sum


def article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("uni", "one", "use"))
    return f"{'an' if vowel or phrase.startswith('hour') else 'a'} {phrase}"


def cap(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def join(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def held_out(a: int, b: int, operator: str) -> bool:
    """Whether this sum is kept out of training, so that `check.py` can ask it. Small sums never are."""
    if max(a, b) <= 20 or operator not in "+-":
        return False
    low, high = sorted((a, b))
    return (low * 7919 + high * 104729 + ord(operator)) % 23 == 0


def invented_name(rng: Rng) -> str:
    """A name that is in no list, such as "Tovi": the model must copy it."""
    return cap("".join(rng.choice(words.SYLLABLES) for _ in range(rng.choice((2, 2, 3)))))


def any_name(rng: Rng) -> str:
    """A common name, or sometimes an invented one."""
    return invented_name(rng) if rng.random() < 0.3 else rng.choice(words.NAMES)[0]


# ---------------------------------------------------------------------------------------------------------- stories


@dataclass
class Hero:
    """Who a story is about."""

    noun: str
    habitat: str
    name: str
    pronoun: str
    adjective: str


def make_hero(rng: Rng) -> Hero:
    """Draws a hero; one in twenty has an invented kind, so that unknown nouns are copied too."""
    habitat = rng.choice(list(words.HEROES))
    noun = rng.choice(words.HEROES[habitat]).replace("-", " ")
    if rng.random() < 0.05:
        noun = invented_name(rng).lower()
    name, pronoun = rng.choice(words.NAMES)
    if rng.random() < 0.12:
        name = invented_name(rng)
    if noun in ("girl", "lioness", "hen", "cow", "queen", "princess", "witch", "mermaid", "grandmother", "woman"):
        pronoun = "she"
    if noun in ("boy", "king", "prince", "rooster", "grandfather", "wizard", "man"):
        pronoun = "he"
    return Hero(noun, habitat, name, pronoun, rng.choice(words.ADJECTIVES))


def forms(pronoun: str, prefix: str = "") -> dict[str, str]:
    """The placeholders of a pronoun: he, him, his and He, His."""
    him, his = ("him", "his") if pronoun == "he" else ("her", "her")
    return {prefix + "he": pronoun, prefix + "him": him, prefix + "his": his, prefix + "He": cap(pronoun), prefix + "His": cap(his)}


@dataclass
class Story:
    """A finished story and the facts a reader may ask about."""

    text: str
    hero: Hero
    friend: Hero
    thing: str
    home: str
    sentences: list[str]


def make_story(rng: Rng, hero: Hero | None = None, friend: Hero | None = None, thing: str | None = None,
               plot: str | None = None, num_plots: int = 1) -> Story:
    """Tells one story; what is not given is drawn."""
    hero = hero or make_hero(rng)
    friend = friend or make_hero(rng)
    while friend.name == hero.name or friend.noun == hero.noun:
        friend = make_hero(rng)
    thing = thing or rng.choice(words.THINGS).replace("-", " ")
    home = rng.choice(words.HOMES[hero.habitat])
    skill, shown = rng.choice(words.SKILLS)
    fear, truth = rng.choice(words.FEARS)
    sound, cause = rng.choice(words.SOUNDS)
    food = rng.choice(words.FOODS)
    values = {
        "name": hero.name, "noun": hero.noun, "a_noun": article(hero.noun), "a_noun_cap": cap(article(hero.noun)), "adj": hero.adjective,
        "a_adj": article(hero.adjective), "friend": friend.name, "friend_noun": friend.noun, "a_friend_noun": article(friend.noun),
        "home": home, "place": rng.choice(words.PLACES[hero.habitat]), "thing": thing, "a_thing": article(thing), "a_thing_cap": cap(article(thing)),
        "food": food, "food_cap": cap(food), "food_tree": rng.choice(["apples", "pears", "plums", "cherries", "nuts"]),
        "weather": rng.choice(words.WEATHERS), "skill": skill, "shown": shown, "fear": fear, "truth": truth, "sound": sound, "cause": cause,
        **forms(hero.pronoun), **forms(friend.pronoun, "f"),
    }
    opening = rng.choice(plots.OPENINGS).format(**values)
    names = [plot] if plot else []
    names += rng.sample([p for p in plots.PLOTS if p not in names], num_plots - len(names))
    paragraphs = []
    for index, name in enumerate(names):
        body = [cap(rng.choice(slot).format(**values)) for slot in plots.PLOTS[name]]
        paragraphs.append(([opening] if index == 0 else []) + body)
    if rng.random() < 0.6:
        paragraphs[-1].append(rng.choice(words.ENDINGS).format(**values))
    split = num_plots == 1 and rng.random() < 0.25
    if split:
        paragraphs = [paragraphs[0][:4], paragraphs[0][4:]]
    text = "\n\n".join(" ".join(p) for p in paragraphs)
    return Story(text, hero, friend, thing, home, [s for p in paragraphs for s in p])


STORY_ASKS = [
    "Tell me a short story about {x}.", "Tell me a story about {x}.", "Write a short story about {x}.", "Write a story about {x}.",
    "Can you tell me a story about {x}?", "Please tell me a story about {x}.", "I would like a story about {x}.", "A story about {x}, please.",
    "Give me a short story about {x}.", "Make up a story about {x}.", "Could you write a short story about {x}?", "Tell me a tale about {x}.",
    "Tell me a bedtime story about {x}.", "Write me a little story about {x}.", "I want to hear about {x}.", "Story about {x}",
    "Tell a story about {x}.", "short story about {x}", "Write a fairy tale about {x}.", "Tell me something about {x} in a story.",
]
PLAIN_STORY_ASKS = ["Tell me a story.", "Tell me a short story.", "Write a story.", "Can you tell me a story?", "A story, please.", "Tell me a bedtime story.",
                    "I want to hear a story.", "Once more, tell me a story.", "Write a short story.", "Please tell me a tale.", "Do you know a story?"]
LONG_STORY_ASKS = ["Tell me a long story about {x}.", "Write a long story about {x}.", "Tell me a story with two adventures of {x}.", "I want a longer story about {x}."]
TOPIC_PLOTS = {
    "friendship": "quarrel", "courage": "fear", "being brave": "fear", "sharing": "sharing", "kindness": "sharing", "patience": "seed", "a garden": "seed",
    "a treasure": "treasure", "a race": "race", "a birthday": "birthday", "a wish": "wish", "a storm": "light", "a light in the dark": "light", "the rain": "rain",
    "two friends": "quarrel", "learning something new": "skill", "getting lost": "lost way", "a strange noise": "sound", "helping others": "repair", "a lost thing": "lost thing",
    "summer": "rain", "hope": "light", "a party": "birthday", "an adventure": "treasure", "night": "sound",
}


def story_turn(rng: Rng) -> tuple[Turn, Story]:
    """A request for a story and the story."""
    hero, roll = make_hero(rng), rng.random()
    if roll < 0.08:
        story = make_story(rng, hero)
        return (rng.choice(PLAIN_STORY_ASKS), story.text), story
    if roll < 0.16:
        topic = rng.choice(list(TOPIC_PLOTS))
        story = make_story(rng, hero, plot=TOPIC_PLOTS[topic])
        return (rng.choice(STORY_ASKS).format(x=topic), story.text), story
    if roll < 0.22:
        story = make_story(rng, hero, num_plots=2)
        return (rng.choice(LONG_STORY_ASKS).format(x=article(hero.noun)), story.text), story
    friend, thing, asks = None, None, STORY_ASKS
    if roll < 0.34:
        x = f"{article(hero.noun)} {rng.choice(('called', 'named'))} {hero.name}"
    elif roll < 0.42:
        x = article(f"{hero.adjective} {hero.noun}")
    elif roll < 0.50:
        friend = make_hero(rng)
        while friend.noun == hero.noun or friend.name == hero.name:
            friend = make_hero(rng)
        x = f"{article(hero.noun)} and {article(friend.noun)}"
        story = make_story(rng, hero, friend)
        return (rng.choice(asks).format(x=x), story.text), story
    elif roll < 0.56:
        thing = rng.choice(words.THINGS).replace("-", " ")
        x = f"{article(hero.noun)} and {article(thing)}"
        plot = rng.choice(["lost thing", "quarrel", "small is good", "birthday", "treasure"])
        story = make_story(rng, hero, thing=thing, plot=plot)
        return (rng.choice(asks).format(x=x), story.text), story
    elif roll < 0.60:
        story = make_story(rng, hero)
        few = story.sentences[0].split(". ")[0].rstrip(".") + ". " + rng.choice(words.ENDINGS[:4]).format(name=hero.name, he=hero.pronoun)
        ask = rng.choice(["Tell me a story about {x} in two sentences.", "Write a very short story about {x}.", "Tell me a tiny story about {x}."])
        story.text = few
        return (ask.format(x=article(hero.noun)), few), story
    else:
        x = article(hero.noun)
    story = make_story(rng, hero, friend, thing)
    return (rng.choice(asks).format(x=x), story.text), story


def story_follow_up(rng: Rng, story: Story) -> Turn:
    """A question about the story just told, or a wish for another."""
    hero = story.hero
    roll = rng.random()
    if roll < 0.35:
        return (rng.choice([f"What was the {hero.noun} called?", f"What was the name of the {hero.noun}?", "What was the hero's name?", "Who was the story about?"]),
                f"The {hero.noun} was called {hero.name}.")
    if roll < 0.6:
        return (rng.choice([f"Where did {hero.name} live?", f"Where did the {hero.noun} live?"]), f"{hero.name} lived {story.home}.")
    if roll < 0.75:
        return ("Give me a title for it.", f"{hero.name} the {cap(hero.noun)}")
    if roll < 0.85:
        return (rng.choice(["I liked it.", "Nice story!", "That was lovely."]), "Thank you! Would you like to hear another one?")
    other = make_story(rng, Hero(hero.noun, hero.habitat, *rng.choice(words.NAMES), rng.choice(words.ADJECTIVES)))
    return (rng.choice(["Tell me another one.", "Another one, please.", f"Tell me another story about {article(hero.noun)}."]), other.text)


# ------------------------------------------------------------------------------------------------------------- sums

ADD_ASKS = ["What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=?", "Add {a} and {b}.", "Calculate {a} + {b}.", "How much is {a} + {b}?",
            "How much is {a} plus {b}?", "What is the sum of {a} and {b}?", "Compute {a} + {b}.", "What does {a} + {b} make?", "Can you add {a} and {b}?",
            "Please add {a} and {b}.", "What do you get if you add {a} and {b}?", "{a} plus {b}", "Tell me what {a} + {b} is.", "What's {a} + {b}?", "what is {a}+{b}"]
SUB_ASKS = ["What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} =", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} - {b}?",
            "How much is {a} minus {b}?", "Compute {a} - {b}.", "Take {b} away from {a}.", "What is the difference of {a} and {b}?", "{a} minus {b}", "What's {a} - {b}?", "what is {a}-{b}"]
MUL_ASKS = ["What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}", "Multiply {a} by {b}.", "Calculate {a} * {b}.", "How much is {a} times {b}?",
            "What is the product of {a} and {b}?", "Compute {a} * {b}.", "{a} times {b}", "What's {a} x {b}?", "What is {a} multiplied by {b}?", "What is {a} x {b}?"]
DIV_ASKS = ["What is {a} / {b}?", "What is {a} divided by {b}?", "{a} / {b}", "{a}/{b}", "Divide {a} by {b}.", "How much is {a} divided by {b}?", "Calculate {a} / {b}."]
ASKS = {"+": ADD_ASKS, "-": SUB_ASKS, "*": MUL_ASKS, "/": DIV_ASKS}
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}

SUM_TALES = [
    ("{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?", "+", "{n} has {r} {t}."),
    ("There are {a} {t} in a box and {b} {t} on the table. How many {t} are there?", "+", "There are {r} {t}."),
    ("{n} has {a} {t} and gives away {b}. How many {t} are left?", "-", "{r} {t} are left."),
    ("There are {a} {t}. {n} eats {b} of them. How many are left?", "-", "{r} {t} are left."),
    ("{n} has {a} bags with {b} {t} in each. How many {t} is that?", "*", "That is {r} {t}."),
    ("If I have {a} {t} and buy {b} more, how many do I have?", "+", "You have {r} {t}."),
    ("If I have {a} {t} and lose {b}, how many do I have?", "-", "You have {r} {t}."),
]
SUM_THINGS = ["apples", "pears", "plums", "nuts", "cherries", "carrots", "biscuits", "lemons"]


def operands(rng: Rng, operator: str, highest: int = HIGHEST) -> tuple[int, int]:
    """Two numbers for a training sum; small ones come often, held-out ones never."""
    while True:
        if operator == "*":
            a, b = rng.randint(0, 12), rng.randint(0, 12)
        elif operator == "/":
            b = rng.randint(1, 12)
            a = b * rng.randint(0, 12)
        else:
            top = rng.choice((10, 20, highest, highest, highest)) if highest > 20 else highest
            a, b = rng.randint(0, top), rng.randint(0, top)
            if operator == "-" and a < b and (max(a, b) > 20 or rng.random() < 0.8):
                a, b = b, a
        if not held_out(a, b, operator):
            return a, b


def sum_answer(a: int, b: int, operator: str) -> str:
    """`7 + 5 = 12`."""
    return f"{a} {operator} {b} = {RESULT[operator](a, b)}"


def sum_turn(rng: Rng) -> Turn:
    """One sum, asked in one of many ways and answered in one."""
    operator = rng.choices("+-*/", (50, 34, 12, 4))[0]
    a, b = operands(rng, operator)
    return rng.choice(ASKS[operator]).format(a=a, b=b), sum_answer(a, b, operator)


def word_sum_turn(rng: Rng) -> Turn:
    """A sum of two numbers written as words."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return (rng.choice(["What is {a} plus {b}?", "How much is {a} plus {b}?", "{a} plus {b}", "Add {a} and {b}."]).format(a=words.NUMBER_WORDS[a], b=words.NUMBER_WORDS[b]),
            cap(f"{words.NUMBER_WORDS[a]} plus {words.NUMBER_WORDS[b]} is {words.NUMBER_WORDS[a + b]}."))


def tale_sum_turn(rng: Rng) -> Turn:
    """A sum told as a small tale."""
    question, operator, answer = rng.choice(SUM_TALES)
    a, b = operands(rng, operator, 20)
    if a < b:
        a, b = b, a
    a, b = max(a, 2), max(b, 2) if operator == "+" else b
    result = RESULT[operator](a, b)
    thing = rng.choice(SUM_THINGS)
    if result == 1:
        return tale_sum_turn(rng)
    return (question.format(n=(name := any_name(rng)), a=a, b=b, t=thing),
            f"{sum_answer(a, b, operator)}. {answer.format(n=name, r=result, t=thing)}")


def big_sum_turn(rng: Rng) -> Turn:
    """A sum with numbers that are too large for the model."""
    operator = rng.choice("+-*")
    a, b = (rng.randint(100, 10 ** rng.choice((3, 4, 5, 6))), rng.randint(13, 10 ** rng.choice((2, 3, 4))))
    return rng.choice(ASKS[operator]).format(a=a, b=b), "That is too big for me. I only learned small sums, with numbers up to 99."


def triple_sum_turn(rng: Rng) -> Turn:
    """Three small numbers, added in two steps."""
    a, b, c = (rng.randint(1, 10) for _ in range(3))
    return (rng.choice(["What is {a} + {b} + {c}?", "{a} + {b} + {c}", "Add {a}, {b} and {c}."]).format(a=a, b=b, c=c),
            f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}")


def compare_turn(rng: Rng) -> Turn:
    """Which of two numbers is larger, or whether one is even."""
    a, b = rng.sample(range(100), 2)
    if rng.random() < 0.4:
        return f"Is {a} even or odd?", f"{a} is {'odd' if a % 2 else 'even'}."
    if rng.random() < 0.5:
        return rng.choice([f"Which is bigger, {a} or {b}?", f"Which number is larger: {a} or {b}?"]), f"{max(a, b)} is bigger than {min(a, b)}."
    return f"What number comes {(w := rng.choice(('after', 'before')))} {a + 1}?", f"{a + 2 if w == 'after' else a} comes {w} {a + 1}."


def sum_sheet(rng: Rng) -> Document:
    """Plain text: a page of sums, one a line; only the results count."""
    parts: Document = []
    for _ in range(rng.randint(10, 24)):
        operator = rng.choices("+-*", (55, 37, 8))[0]
        question, answer = sum_answer(*operands(rng, operator), operator).split(" = ")
        parts += [(f"{question} =", False), (f" {answer}\n", True)]
    return parts


# ------------------------------------------------------------------------------------------------------------- JSON

FIELDS: dict[str, Callable[[Rng], object]] = {
    "name": any_name, "first_name": any_name, "age": lambda r: r.randint(3, 90), "city": lambda r: r.choice(words.CITIES),
    "country": lambda r: r.choice(words.COUNTRIES), "job": lambda r: r.choice(words.JOBS), "hobby": lambda r: r.choice(words.HOBBIES),
    "color": lambda r: r.choice(words.COLOURS), "colour": lambda r: r.choice(words.COLOURS), "fruit": lambda r: r.choice(words.FRUITS),
    "price": lambda r: r.randint(1, 99), "quantity": lambda r: r.randint(1, 20), "title": lambda r: r.choice(words.TITLES),
    "year": lambda r: r.randint(1950, 2025), "pages": lambda r: r.randint(40, 600), "animal": lambda r: r.choice(words.SPECIES),
    "species": lambda r: r.choice(words.SPECIES), "id": lambda r: r.randint(1, 999), "active": lambda r: r.random() < 0.5,
    "email": lambda r: any_name(r).lower() + "@example.com", "product": lambda r: r.choice(words.PRODUCTS), "author": any_name,
    "height": lambda r: r.randint(100, 200), "temperature": lambda r: r.randint(-10, 35), "done": lambda r: r.random() < 0.5,
    "tags": lambda r: r.sample(words.COLOURS, r.randint(1, 3)), "hobbies": lambda r: r.sample(words.HOBBIES, r.randint(2, 3)),
    "day": lambda r: r.choice(dict(words.CATEGORIES)["days of the week"]), "month": lambda r: r.choice(dict(words.CATEGORIES)["months"]),
    "size": lambda r: r.choice(["small", "medium", "large"]), "status": lambda r: r.choice(["ok", "open", "closed", "waiting"]),
    "count": lambda r: r.randint(0, 50), "score": lambda r: r.randint(0, 100), "language": lambda r: r.choice(["English", "French", "German", "Spanish"]),
    "food": lambda r: r.choice(words.FOODS), "weight": lambda r: r.randint(1, 99), "married": lambda r: r.random() < 0.5,
}
ENTITIES: dict[str, list[str]] = {
    "person": ["name", "age", "city", "job", "hobby", "country", "email"], "book": ["title", "author", "year", "pages"],
    "product": ["product", "price", "color", "size", "quantity"], "pet": ["name", "species", "age", "color"], "user": ["id", "name", "email", "active"],
    "animal": ["species", "name", "age", "weight"], "task": ["id", "title", "done"], "student": ["name", "age", "score"],
    "city": ["city", "country"], "fruit": ["fruit", "color", "price"], "event": ["title", "day", "city"], "employee": ["name", "job", "age"],
}
JSON_KEY_ASKS = [
    "Give me a JSON object with {k}.", "Give me a JSON object with {k}", "Write a JSON object with {k}.", "Return JSON with {k}.", "Make a JSON object with {k}.",
    "Create a JSON object with the keys {k}.", "I need JSON with {k}.", "Please give me JSON with {k}.", "JSON with {k}", "Answer in JSON with {k}.",
    "Output a JSON object with the fields {k}.", "Can you write JSON with {k}?", "Show me a JSON object that has {k}.", "Generate a JSON object with {k}.",
    "Reply only with JSON. It should have {k}.", "Give me a JSON object containing {k}.", "Produce a JSON object with {k}.",
]
JSON_ENTITY_ASKS = ["Give me a JSON object for {e}.", "Describe {e} as JSON.", "Write JSON for {e}.", "Give me {e} in JSON.", "Make up {e} and return it as JSON.", "JSON object for {e}, please.",
                    "Show me {e} as JSON.", "Give me an example of JSON for {e}."]


def dumps(value: object) -> str:
    """JSON as the model writes it: one line, spaces after commas and colons."""
    return json.dumps(value, ensure_ascii=False)


PLAIN_KEYS = ("hobbies", "tags", "pages", "active", "done", "married")


def key_list(rng: Rng, keys: list[str]) -> str:
    """Keys as a person names them: `a name and an age`, `name and age`, `"name", "age"`."""
    style = rng.randrange(4)
    if style == 0:
        return join([article(k.replace("_", " ")) if k not in PLAIN_KEYS else k for k in keys])
    if style == 1:
        return join(keys)
    return join([f'"{k}"' for k in keys]) if style == 2 else ", ".join(keys)


def json_turn(rng: Rng) -> Turn:
    """A request for JSON and valid JSON with the keys that were asked for."""
    roll = rng.random()
    if roll < 0.5:
        keys = rng.sample(list(FIELDS), rng.choice((1, 2, 2, 2, 3, 3, 4)))
        if rng.random() < 0.15:
            keys[:2] = ["name", "age"]
            keys = list(dict.fromkeys(keys))
        if rng.random() < 0.1:  # a key that has no meaning to the model
            keys[-1] = invented_name(rng).lower()
        return (rng.choice(JSON_KEY_ASKS).format(k=key_list(rng, keys)),
                dumps({k: FIELDS[k](rng) if k in FIELDS else rng.choice([rng.randint(1, 99), rng.choice(words.COLOURS)]) for k in keys}))
    if roll < 0.64:
        entity = rng.choice(list(ENTITIES))
        return rng.choice(JSON_ENTITY_ASKS).format(e=article(entity)), dumps({k: FIELDS[k](rng) for k in ENTITIES[entity][: rng.choice((2, 3, 4))]})
    if roll < 0.84:  # values given by the user
        name, age = any_name(rng), rng.randint(3, 90)
        city = rng.choice(words.CITIES)
        return given_json(rng, name, age, city)
    if roll < 0.94:
        category, members = rng.choice([c for c in words.CATEGORIES if not c[0].endswith("numbers")])
        count = rng.randint(2, 4)
        ask = rng.choice(["Give me a JSON array of {n} {c}.", "List {n} {c} as a JSON array.", "Return {n} {c} as JSON.", "Write a JSON list with {n} {c}."])
        return ask.format(n=words.NUMBER_WORDS[count], c=category), dumps(rng.sample(members, count))
    count = rng.randint(2, 3)
    entity = rng.choice(["person", "pet", "user", "book"])
    plural = {"person": "people", "pet": "pets", "user": "users", "book": "books"}[entity]
    return (f"Give me a JSON array of {words.NUMBER_WORDS[count]} {plural}.", dumps([{k: FIELDS[k](rng) for k in ENTITIES[entity][:2]} for _ in range(count)]))


def given_json(rng: Rng, name: str, age: int, city: str) -> Turn:
    """A request that names its values."""
    question, value = rng.choice([
        (f"Give me a JSON object with name {name} and age {age}.", {"name": name, "age": age}),
        (f"Give me a JSON object for a person called {name} who is {age} years old.", {"name": name, "age": age}),
        (f"{name} is {age} years old and lives in {city}. Write that as JSON.", {"name": name, "age": age, "city": city}),
        (f"Turn this into JSON: {name}, {age}, {city}", {"name": name, "age": age, "city": city}),
        (f"Write JSON with the name {name} and the city {city}.", {"name": name, "city": city}),
        (f"JSON: name = {name}, age = {age}", {"name": name, "age": age}),
    ])
    return question, dumps(value)


# ------------------------------------------------------------------------------------------- lists, facts and words

COUNT_WORDS = words.NUMBER_WORDS


def list_turn(rng: Rng) -> Turn:
    """`Name three colours.`"""
    category, members = rng.choice(words.CATEGORIES)
    count = rng.randint(2, min(6, len(members)))
    number = COUNT_WORDS[count] if rng.random() < 0.7 else str(count)
    ask = rng.choice(["Name {n} {c}.", "List {n} {c}.", "Give me {n} {c}.", "Tell me {n} {c}.", "Can you name {n} {c}?", "Write down {n} {c}.", "{n} {c}, please."])
    chosen = rng.sample(members, count)
    if ask.startswith("List") and rng.random() < 0.7 or rng.random() < 0.25:
        return ask.format(n=number, c=category), "\n".join(f"{i}. {cap(m)}" for i, m in enumerate(chosen, 1))
    return cap(ask.format(n=number, c=category)), cap(join(chosen)) + "."


def sequence_turn(rng: Rng) -> Turn:
    """Days, months, neighbours of both, the alphabet and counting."""
    lists = dict(words.CATEGORIES)
    days, months = lists["days of the week"], lists["months"]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    a, n = rng.randint(0, 90), rng.randint(3, 20)
    i, j, k = rng.randrange(7), rng.randrange(12), rng.randrange(25)
    return rng.choice([
        (rng.choice(["What are the days of the week?", "Name the days of the week.", "List all days of the week."]), join(days) + "."),
        (rng.choice(["What are the months of the year?", "Name the months.", "List all months."]), join(months) + "."),
        (rng.choice(["What are the four seasons?", "Name the seasons."]), "Spring, summer, autumn and winter."),
        (rng.choice(["Say the alphabet.", "Write the alphabet.", "What is the alphabet?"]), " ".join(alphabet)),
        (f"What day comes after {days[i]}?", f"{days[(i + 1) % 7]} comes after {days[i]}."),
        (f"What day comes before {days[i]}?", f"{days[i - 1]} comes before {days[i]}."),
        (f"What month comes after {months[j]}?", f"{months[(j + 1) % 12]} comes after {months[j]}."),
        (f"Which letter comes after {alphabet[k]}?", f"{alphabet[k + 1]} comes after {alphabet[k]}."),
        (rng.choice(["How many days are in a week?", "How many days does a week have?"]), "A week has seven days."),
        ("How many months are in a year?", "A year has twelve months."),
        ("How many hours are in a day?", "A day has 24 hours."), ("How many minutes are in an hour?", "An hour has 60 minutes."),
        (rng.choice([f"Count from {a} to {a + n}.", f"Count up from {a} to {a + n}."]), ", ".join(map(str, range(a, a + n + 1)))),
        (f"Count to {COUNT_WORDS[n]}.", ", ".join(map(str, range(1, n + 1)))),
        (rng.choice([f"Count to {n}.", f"Count from 1 to {n}.", f"Please count to {n}."]), ", ".join(map(str, range(1, n + 1)))),
        (rng.choice([f"Count down from {n}.", f"Count backwards from {n}."]), ", ".join(map(str, range(n, -1, -1)))),
        (f"Count to {(m := rng.choice((30, 40, 50, 100)))}.", ", ".join(map(str, range(1, m + 1)))) if rng.random() < 0.3 else (f"Count to {n}.", ", ".join(map(str, range(1, n + 1)))),
    ])


def word_turn(rng: Rng) -> Turn:
    """Opposites, plurals, past tenses, capital letters, spelling and repeating."""
    kind = rng.randrange(6)
    if kind == 0:
        a, b = rng.choice(words.OPPOSITES)
        if rng.random() < 0.5:
            a, b = b, a
        return rng.choice([f"What is the opposite of {a}?", f"Opposite of {a}?", f"Give me the opposite of {a}.", f"What is the opposite of \"{a}\"?"]), f"The opposite of {a} is {b}."
    if kind == 1:
        a, b = rng.choice(words.PLURALS)
        return rng.choice([f"What is the plural of {a}?", f"Plural of {a}?", f"Give me the plural of \"{a}\"."]), f"The plural of {a} is {b}."
    if kind == 2:
        a, b = rng.choice(words.PASTS)
        return rng.choice([f"What is the past tense of {a}?", f"Past tense of {a}?"]), f"The past tense of {a} is {b}."
    pool = words.FRUITS + words.COLOURS + words.SPECIES + words.JOBS + ["quire", "hello", "paper", "token", "river", "house", "water", "garden", "story", "model"]
    word = rng.choice(pool)
    if kind == 3:
        return rng.choice([f"Write {word} in capital letters.", f"Write \"{word}\" in upper case.", f"Say {word} in capitals.", f"Uppercase: {word}"]), word.upper()
    if kind == 4:
        return rng.choice([f"How do you spell {word}?", f"Spell {word}.", f"Spell the word {word}."]), "-".join(word.upper())
    phrase = rng.choice([word, f"{word} and {rng.choice(pool)}", f"{any_name(rng)} has {article(rng.choice(pool))}", f"the {word} is {rng.choice(words.COLOURS)}", invented_name(rng),
                         f"{invented_name(rng)} {invented_name(rng)}", " ".join(rng.sample(pool, 3)), f"I like {word}"])
    return rng.choice([f"Repeat after me: {phrase}", f"Say: {phrase}", f"Repeat this: {phrase}", f"Please say \"{phrase}\"", f"Write exactly this: {phrase}", f"Say \"{phrase}\".", f"Say {phrase}.",
                       f"Echo: {phrase}"]), phrase


def fact_turn(rng: Rng) -> Turn:
    """Capitals of countries, and what animals say."""
    kind = rng.randrange(5)
    if kind <= 1:
        a, b = rng.choice(words.CAPITALS)
        return (rng.choice([f"What is the capital of {a}?", f"Capital of {a}?", f"Which city is the capital of {a}?", f"Tell me the capital of {a}.", f"Do you know the capital of {a}?"]),
                f"The capital of {a} is {b}{'' if b.endswith('.') else '.'}")
    if kind == 2:
        a, b = rng.choice(words.ANIMAL_SOUNDS)
        return rng.choice([f"What does {article(a)} say?", f"What sound does {article(a)} make?"]), f"{cap(article(a))} says {b}."
    if kind == 3:
        a, b = rng.choice(words.LEGS)
        return rng.choice([f"How many legs does {article(a)} have?", f"How many legs has {article(a)}?"]), f"{cap(article(a))} has {b} {'arms' if a == 'octopus' else 'legs'}."
    a, b = rng.choice(words.COLOURS_OF)
    return rng.choice([f"What colour is {a}?", f"What color is {a}?", f"Which colour has {a}?"]), f"{cap(a)} is {b}."


def poem_turn(rng: Rng) -> Turn:
    """Four lines of verse."""
    topic = rng.choice(plots.POEM_TOPICS)
    ask = rng.choice(["Write a poem about the {x}.", "Write a short poem about a {x}.", "Can you write a poem about the {x}?", "A poem about the {x}, please.", "Tell me a rhyme about the {x}."])
    return ask.format(x=topic), "\n".join(cap(line.format(x=topic)) for line in rng.choice(plots.POEMS))


def joke_turn(rng: Rng) -> Turn:
    """A small joke."""
    return rng.choice(["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke, please.", "Tell me something funny."]), rng.choice(plots.JOKES)


def topic_turn(topics: list[tuple[list[str], list[str]]]) -> Callable[[Rng], Turn]:
    """A maker of turns from lists of questions and answers."""

    def turn(rng: Rng) -> Turn:
        questions, answers = rng.choice(topics)
        question, roll = rng.choice(questions), rng.random()
        if roll < 0.08:
            question = question.lower()
        elif roll < 0.16:
            question = question.replace("What is ", "What's ")
        return question, rng.choice(answers)

    return turn


UNKNOWN_ANSWER = "I do not know that. I am only a small demo model of Quire. Load a real model for real questions."


def unknown_turn(rng: Rng) -> Turn:
    """A question that is outside what the model was taught, answered honestly."""
    if rng.random() < 0.3:
        return rng.choice(words.UNKNOWN_FIXED), UNKNOWN_ANSWER
    x, y = rng.sample(words.UNKNOWN_TOPICS, 2)
    if rng.random() < 0.15:
        x = invented_name(rng)
    return cap(rng.choice(words.UNKNOWN_QUESTIONS).format(x=x, y=y)), UNKNOWN_ANSWER


NAME_QUESTIONS = ("What is my name?", "Do you know my name?", "Do you remember me?")


def name_turns(rng: Rng) -> list[Turn]:
    """The user says a name (or a favourite) and asks for it later."""
    name, job, city = any_name(rng), rng.choice(words.JOBS), rng.choice(words.CITIES)
    animal, colour = rng.choice(words.SPECIES), rng.choice(words.COLOURS)
    said, asked, answer = rng.choice([
        ((f"My name is {name}.", f"Hello {name}! I am the demo model of Quire. How can I help you?"), "What is my name?", f"Your name is {name}."),
        ((f"Hi, I am {name}.", f"Hello {name}! I am the demo model of Quire. How can I help you?"), "What is my name?", f"Your name is {name}."),
        ((f"Hello, my name is {name}", f"Hello {name}! I am the demo model of Quire. How can I help you?"), "Do you remember my name?", f"Yes, your name is {name}."),
        ((f"I live in {city}.", f"{city} must be a nice place."), "Where do I live?", f"You live in {city}."),
        ((f"I am {article(job)}.", f"It must be interesting to be {article(job)}."), "What is my job?", f"You are {article(job)}."),
        ((f"I have {article(animal)} called {name}.", f"{name} is a lovely name for {article(animal)}."), f"What is my {animal} called?", f"Your {animal} is called {name}."),
        ((f"My favourite colour is {colour}.", f"{cap(colour)} is a beautiful colour."), "What is my favourite colour?", f"Your favourite colour is {colour}."),
    ])
    between = [t for t in (any_turn(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))) if t[0] not in NAME_QUESTIONS]
    return [said, *between, (asked, answer)] if rng.random() < 0.85 else [said]


def carry_on_sum(rng: Rng) -> list[Turn]:
    """A sum, then another that starts from its result."""
    a, b = operands(rng, "+", 20)
    c = rng.choice([n for n in range(1, 11) if not held_out(a + b, n, "+")])
    return [(rng.choice(ADD_ASKS[:5]).format(a=a, b=b), sum_answer(a, b, "+")),
            (rng.choice(["And plus {c}?", "Now add {c}.", "Add {c} to that.", "Plus {c}?"]).format(c=c), sum_answer(a + b, c, "+"))]


# -------------------------------------------------------------------------------------------------------- documents

SHORT_TURNS: list[tuple[Callable[[Rng], Turn], float]] = [
    (sum_turn, 30), (word_sum_turn, 1.5), (tale_sum_turn, 4), (big_sum_turn, 2), (triple_sum_turn, 2), (compare_turn, 2),
    (topic_turn(quire_facts.TOPICS), 20), (topic_turn(quire_facts.IDENTITY), 14), (json_turn, 17), (list_turn, 7), (sequence_turn, 6),
    (word_turn, 9), (fact_turn, 8), (poem_turn, 2), (joke_turn, 1), (unknown_turn, 8),
]
SYSTEM_MESSAGES = [
    "You are a helpful assistant.", "You are the demo model of Quire.", "You are a friendly assistant.", "Answer briefly.", "You are a helpful AI assistant.",
    "Be kind and short.", "You answer questions.", "Please be polite.", "You are a small language model.", "Respond concisely.", "You are a storyteller.",
    "You are a helpful, honest assistant. Answer in English.", "Today is a nice day.", "Help the user.", "You are Quire.",
]
PREFIXES = ["Please tell me: ", "Tell me, ", "Quick question: ", "Hi. ", "Hello! ", "Hey, ", "I have a question. ", "Question: ", "Now: ", "OK. "]
REQUESTS = ("Add", "Can you", "Count", "Give", "List", "Make", "Name", "Say", "Spell", "Tell", "What", "Write")


def any_turn(rng: Rng) -> Turn:
    """One short exchange of any kind."""
    makers, weights = zip(*SHORT_TURNS)
    return rng.choices(makers, weights)[0](rng)


def casual(rng: Rng, question: str) -> str:
    """The question as people type it: sometimes in lower case, without its last mark, or with a word before it."""
    roll = rng.random()
    if "\"" in question or ":" in question or len(question) < 8:
        return question
    if roll < 0.10:
        lower = question[0].lower() + question[1:]
        return question if question.startswith(("I ", "JSON")) else lower
    if roll < 0.18:
        return question.rstrip(".?!")
    if roll < 0.22:
        return (question[0].lower() + question[1:]).rstrip(".?!")
    if roll < 0.26:
        prefix = rng.choice(PREFIXES)
        return prefix + (question[0].lower() + question[1:] if prefix.endswith(", ") and not question.startswith(("I ", "JSON")) else question)
    if roll < 0.28 and question.startswith(REQUESTS):
        return question.rstrip(".?!") + ", please" + (question[-1] if question[-1] in ".?!" else "")
    return question


def chat(rng: Rng, turns: list[Turn], system: str | None = None) -> Document:
    """A conversation in ChatML, as the chat template writes it."""
    parts: Document = [(f"{IM_START}system\n{system}{IM_END}\n", False)] if system else []
    for question, answer in turns:
        parts.append((f"{IM_START}user\n{casual(rng, question)}{IM_END}\n{IM_START}assistant\n", False))
        parts.append((f"{answer}{IM_END}", True))
        parts.append(("\n", False))
    return parts[:-1]


def maybe_system(rng: Rng) -> str | None:
    """One conversation in five has a system message."""
    return rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.2 else None


def short_chat(rng: Rng) -> Document:
    """One to five short exchanges."""
    return chat(rng, [any_turn(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 5)))], maybe_system(rng))


def story_chat(rng: Rng) -> Document:
    """A story on request, sometimes among other turns and with questions after it."""
    before = [any_turn(rng)] if rng.random() < 0.12 else []
    turn, story = story_turn(rng)
    after = []
    if rng.random() < 0.2 and "two sentences" not in turn[0] and "very short" not in turn[0] and "tiny" not in turn[0]:
        after.append(story_follow_up(rng, story))
    if rng.random() < 0.08:
        after.append(any_turn(rng))
    return chat(rng, [*before, turn, *after], maybe_system(rng))


def memory_chat(rng: Rng) -> Document:
    """A conversation in which a later answer needs an earlier turn."""
    turns = name_turns(rng) if rng.random() < 0.75 else carry_on_sum(rng)
    return chat(rng, turns, maybe_system(rng))


def named_user_chat(rng: Rng) -> Document:
    """A system message that names the user."""
    name = any_name(rng)
    asked = rng.choice([("What is my name?", f"Your name is {name}."), ("Hello", f"Hello {name}! I am the demo model of Quire. How can I help you?")])
    return chat(rng, [asked], f"The user's name is {name}.")


def plain_story(rng: Rng) -> Document:
    """A story without chat markup, sometimes with a hole to fill in."""
    text = make_story(rng, num_plots=rng.choice((1, 1, 1, 2))).text
    if rng.random() < 0.15:
        left, right = sorted(rng.sample(range(10, len(text) - 10), 2))
        right = min(right, left + 160)
        return [(f"{FIM[0]}{text[:left]}{FIM[1]}{text[right:]}{FIM[2]}", False), (text[left:right], True)]
    return [(text, True)]


def plain_fact(rng: Rng) -> Document:
    """Plain sentences: facts about Quire, or questions and answers written out."""
    if rng.random() < 0.5:
        return [(" ".join(rng.choice(a) for _, a in rng.sample(quire_facts.TOPICS[:2] + quire_facts.TOPICS[3:], 3)), True)]
    turns = [any_turn(rng) for _ in range(rng.randint(1, 3))]
    return [("\n\n".join(f"Question: {q}\nAnswer: {a}" for q, a in turns), True)]


DOCUMENTS: list[tuple[Callable[[Rng], Document], float]] = [
    (short_chat, 62), (story_chat, 16), (memory_chat, 5), (named_user_chat, 0.7), (plain_story, 5), (sum_sheet, 6), (plain_fact, 1.5),
]


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of documents, the same for the same seed."""
    rng = random.Random(seed)
    makers, weights = zip(*DOCUMENTS)
    while True:
        yield rng.choices(makers, weights)[0](rng)


def text_of(document: Document) -> str:
    """A document as one string."""
    return "".join(text for text, _ in document)


def main() -> None:
    """Prints a sample of the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=20)
    args = parser.parse_args()
    stream = documents(args.seed)
    for _ in range(args.documents):
        print(text_of(next(stream)), END_OF_TEXT, sep="")


if __name__ == "__main__":
    main()
