"""Measures Quire's demo model with transformers: sums it never saw, JSON, facts, memory, and sample answers.

    python check.py            # the figures of README.md
    python check.py --samples  # the sample answers alone
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus
import quire_facts
import words

HERE = Path(__file__).parent
SEED = 977  # not a seed of training
SAMPLES = [
    "Hello", "Who are you?", "What is Quire?", "How do I start Quire?", "What is a paged KV cache?", "Tell me a short story about a fox.",
    "Write a story about a robot and a lantern.", "What is 7 + 5?", "What is 48 + 37?", "Anna has 9 apples and gives away 4. How many are left?",
    "Give me a JSON object with a name and an age", "Tovi is 31 years old and lives in Oslo. Write that as JSON.", "Name three colours.",
    "What is the capital of France?", "What is the opposite of hot?", "Who won the World Cup?",
]


class Model:
    """The model and its tokenizer, answering in batches."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    def complete(self, prompts: list[str], num_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        """What follows each prompt, which is given with its markup."""
        answers = []
        for start in range(0, len(prompts), 64):
            inputs = self.tokenizer(prompts[start : start + 64], return_tensors="pt", padding=True, return_token_type_ids=False)
            how = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False, "temperature": None, "top_p": None}
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=num_tokens, **how)
            answers += self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def chat(self, conversations: list[list[str]], num_tokens: int = 64, temperature: float = 0.0) -> list[str]:
        """The answer to each conversation: user and assistant in turn, the user last."""
        prompts = [self.tokenizer.apply_chat_template(
            [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)], tokenize=False, add_generation_prompt=True)
            for turns in conversations]
        return self.complete(prompts, num_tokens, temperature)


def share(name: str, right: list[bool]) -> None:
    """Prints one figure."""
    print(f"| {name} | {sum(right)} of {len(right)} | {100 * sum(right) / len(right):.1f} % |", flush=True)


def check_sums(model: Model, name: str, sums: list[tuple[int, int]], operator: str) -> None:
    """Whether `What is a + b?` gets exactly `a + b = c`."""
    answers = model.chat([[f"What is {a} {operator} {b}?"] for a, b in sums], 24)
    share(name, [answer == corpus.sum_answer(a, b, operator) for answer, (a, b) in zip(answers, sums)])


def same_shape(answer: str, wanted: str) -> tuple[bool, bool]:
    """Whether the answer is JSON at all, and whether it also has the keys (or the length) that were asked for."""
    try:
        value, target = json.loads(answer), json.loads(wanted)
    except ValueError:
        return False, False
    if isinstance(target, dict):
        return True, isinstance(value, dict) and list(value) == list(target)
    return True, isinstance(value, list) and len(value) == len(target)


def check(model: Model, part: float) -> None:
    """Prints the table of figures; `part` of the questions is asked."""
    rng = random.Random(SEED)

    def some(items: list) -> list:
        return rng.sample(items, max(1, round(part * len(items))))

    print("| What | Right | Share |\n|---|---|---|")
    grid = [(a, b) for a in range(100) for b in range(100)]
    check_sums(model, "Held-out additions up to 99 + 99", some(rng.sample([p for p in grid if corpus.held_out(*p, "+")], 300)), "+")
    check_sums(model, "Held-out subtractions up to 99 - 99", some(rng.sample([p for p in grid if corpus.held_out(*p, "-") and p[0] >= p[1]], 150)), "-")
    check_sums(model, "Additions up to 12 + 12", some([(a, b) for a in range(1, 13) for b in range(1, 13)]), "+")
    check_sums(model, "Multiplications up to 12 * 12", some([(a, b) for a in range(1, 13) for b in range(1, 13)]), "*")

    turns = some([corpus.json_turn(rng) for _ in range(300)])
    shapes = [same_shape(answer, wanted) for answer, (_, wanted) in zip(model.chat([[q] for q, _ in turns], 120), turns)]
    share("Answers that are valid JSON when JSON is asked for", [valid for valid, _ in shapes])
    share("... and have the keys or the length asked for", [shape for _, shape in shapes])
    turns = some([corpus.json_turn(rng) for _ in range(150)])
    torch.manual_seed(SEED)
    share("Valid JSON at temperature 0.7", [same_shape(a, w)[0] for a, (_, w) in zip(model.chat([[q] for q, _ in turns], 120, 0.7), turns)])

    facts = some([(q, answers) for questions, answers in quire_facts.TOPICS for q in questions])
    share("Questions about Quire answered with the right fact", [a in wanted for a, (_, wanted) in zip(model.chat([[q] for q, _ in facts], 90), facts)])
    unknown = some([corpus.unknown_turn(rng) for _ in range(150)])
    share("Unknown questions answered with \"I do not know\"", [a == w for a, (_, w) in zip(model.chat([[q] for q, _ in unknown]), unknown)])

    conversations = []
    for _ in range(round(150 * part)):
        name = corpus.invented_name(rng)
        between = [text for _ in range(rng.randint(0, 3)) for text in corpus.sum_turn(rng)]
        conversations.append(([f"My name is {name}.", f"Hello {name}! I am the demo model of Quire. How can I help you?", *between, "What is my name?"], name))
    share("Invented names remembered over up to three turns", [a == f"Your name is {n}." for a, (_, n) in zip(model.chat([c for c, _ in conversations]), conversations)])

    nouns = some(sorted({noun.replace("-", " ") for nouns in words.HEROES.values() for noun in nouns}))
    stories = model.chat([[f"Tell me a short story about {corpus.article(n)}."] for n in nouns], 320)
    share("Stories about the hero that was asked for, with an end", [n in s and s.rstrip()[-1] in ".\"!?" and len(s) < 1400 for n, s in zip(nouns, stories)])


def samples(model: Model, temperature: float) -> None:
    """Prints sample prompts with their answers."""
    torch.manual_seed(SEED)
    for prompt, answer in zip(SAMPLES, model.chat([[p] for p in SAMPLES], 320, temperature)):
        print(f"**{prompt}**\n\n> " + answer.replace("\n", "\n> ") + "\n")
    (text,) = model.complete(["Once upon a time"], 200, temperature)
    print("**Once upon a time** (plain completion)\n\n> " + f"Once upon a time{text}".replace("\n", "\n> ") + "\n")


def main() -> None:
    """Runs the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the samples")
    parser.add_argument("--part", type=float, default=1.0, help="share of the questions that is asked")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = Model(args.model)
    if not args.samples:
        check(model, args.part)
    samples(model, args.temperature)


if __name__ == "__main__":
    main()
