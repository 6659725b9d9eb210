"""Write the demo's data set: messages to a small bakery, each answered by one JSON record.

    python examples/make_requests.py                # writes examples/requests/train.jsonl and heldout.jsonl
    python examples/make_requests.py --seed 7 --train_rows 5000 --output_dir /tmp/requests

A row is a chat of three messages: a short system message, what the customer writes, and the record
`{"action":...,"item":...,"quantity":...,"day":...,"name":...}`, its keys in that order and without spaces.
`item` and `name` are copied as the customer wrote them, `quantity` is a number, `day` is in lower case, and what
the customer did not say is `null`.

The held-out rows measure generalisation, not memory. No held-out message is in the training file. Some flavours
and some names, chosen by the seed, are kept out of training altogether: of every four held-out rows one asks for
an item with such a flavour and one comes from a person with such a name.

Only `random.Random.random()` is drawn from, the one method whose sequence Python keeps between versions, so a seed
gives the same bytes everywhere.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

SYSTEM = "Turn the message into one JSON record."

# An item is a flavour and a thing, so that nearly every pair is new even where both words are known.
FLAVOURS = """
almond anise apple apricot bacon banana barley basil beetroot blackberry blackcurrant blueberry bran brandy
buckwheat butter buttermilk butterscotch cabbage caramel caraway cardamom carrot cashew celery cheddar cheese
cherry chestnut chicken chilli chive chocolate cinnamon clove cocoa coconut coffee coriander corn courgette
cranberry cream cumin currant custard dill egg elderberry fennel feta fig fruit fudge garlic ginger goat gooseberry
granola grape grapefruit ham hazelnut hemp herb hibiscus honey jam kale kiwi lavender leek lemon lentil lime
linseed liquorice lychee macadamia mango maple marble marmalade marzipan meat melon milk millet mincemeat mint mocha
molasses mushroom mustard nougat nut nutmeg oat olive onion orange papaya paprika parmesan parsley parsnip peach
peanut pear pecan pepper pesto pineapple pistachio plum pomegranate poppy potato praline prune pumpkin quince raisin
raspberry rhubarb rice ricotta rocket rosemary rum rye saffron sage salmon salt sausage seaweed seed sesame shallot
spelt spinach squash strawberry sugar sultana sunflower syrup tahini tapioca thyme toffee tomato treacle tuna turkey
turmeric turnip vanilla vegetable violet walnut wheat yeast yoghurt
"""
THINGS = """
bagel bagels, baguette baguettes, bar bars, biscuit biscuits, bun buns, cake cakes, cookie cookies, cracker crackers,
croissant croissants, cupcake cupcakes, doughnut doughnuts, eclair eclairs, flatbread flatbreads, loaf loaves,
macaron macarons, meringue meringues, muffin muffins, pancake pancakes, pastry pastries, pie pies, pretzel pretzels,
quiche quiches, roll rolls, scone scones, slice slices, tart tarts, twist twists, waffle waffles
"""
NAMES = """
Ada Adam Agnes Ahmed Aisha Alan Alice Amir Amy Ana Andrea Andrew Anna Anton Arthur Astrid Ben Beth Bianca Boris
Bruno Carla Carlos Cecilia Charles Chen Chloe Clara Colin Daniel David Deepa Dennis Diana Diego Dora Edith Elena
Elias Ella Emil Emma Eric Esther Eva Farah Fatima Felix Fiona Frank Gabriel George Gita Grace Greta Hamid Hana
Hannah Helen Henry Hugo Ibrahim Ingrid Irene Iris Ivan Jack Jamal James Jane Jonas Joseph Julia Karim Kate Keith
Kenji Kiran Laila Laura Lena Leo Liam Linda Louis Lucas Lucy Magnus Marco Maria Mark Martin Maya Mei Mia Miguel Mina
Mohamed Monica Nadia Nathan Nina Noah Nora Olga Oliver Omar Oscar Otto Pablo Paul Paula Pedro Peter Philip Priya
Rachel Rafael Ravi Robert Rosa Ruth Ryan Salma Samuel Sandra Sara Sean Simon Sofia Stefan Susan Tariq Teresa Thomas
Tim Tina Tom Ursula Vera Victor Wanda Wei William Yara Yusuf Zoe
"""
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

# {some}: a quantity and an item; {items}: the plural alone; {when}: a day with its preposition, or nothing.
BODIES = {
    "order": [
        "Could you put aside {some}{when}?",
        "I'd like {some}{when}, please.",
        "Please keep {some} for me{when}.",
        "Can I get {some}{when}?",
        "We need {some}{when}.",
        "May I order {some}{when}?",
        "Put me down for {some}{when}.",
        "I would love {some}{when} if possible.",
        "Could I have {some} ready{when}?",
        "I'm coming in for {some}{when}.",
        "Please bake {some} for us{when}.",
    ],
    "change": [
        "Please change my order to {some}{when}.",
        "Can you make it {some} instead{when}?",
        "Could we switch to {some}{when}?",
        "Change of plan: {some}{when} instead, please.",
        "I'd rather have {some}{when} than what I ordered.",
        "Swap what I ordered for {some}{when}.",
    ],
    "cancel": [
        "Please cancel {some}{when}.",
        "I no longer need {some}{when}.",
        "Sorry, I have to cancel {some}{when}.",
        "Forget about {some}{when}, the party is off.",
        "I won't be able to collect {some}{when}.",
        "Can you take {some} off my order{when}?",
    ],
    "ask": [
        "Do you have any {items}{when}?",
        "Will there be {items}{when}?",
        "Do you still bake {items}?",
        "Are you selling {items}{when}?",
        "How much are the {items}?",
        "Are the {items} vegan?",
        "Is there milk in your {items}?",
    ],
}
ACTIONS = ["order", "order", "change", "cancel", "ask"]  # two of five are orders

GREETINGS = ["Hi, ", "Hello, ", "Hi there! ", "Good morning. ", "Hey! ", "Good evening, ", "Dear bakers, "]
INTRODUCTIONS = ["it's {name}. ", "this is {name}. ", "{name} here. ", "my name is {name}. "]
SIGNATURES = [
    " Thanks, {name}",
    " Best, {name}",
    " It's for {name}.",
    " The name is {name}.",
    " Under {name}, please.",
]
CLOSINGS = [" Thanks!", " Thank you.", " Cheers.", " Many thanks!", " See you soon."]

Choice = TypeVar("Choice")


class Vocabulary(NamedTuple):
    flavours: list[str]
    names: list[str]


class Request(NamedTuple):
    text: str
    record: dict[str, str | int | None]


def pick(rng: random.Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(rng.random() * len(choices))]


def keep_out(rng: random.Random, words: list[str], share: float) -> tuple[list[str], list[str]]:
    """The words for training, and a random `share` of them for the held-out rows alone."""
    kept_out = sorted(words, key=lambda _: rng.random())[: round(share * len(words))]
    return [word for word in words if word not in kept_out], sorted(kept_out)


def quantity_and_item(rng: random.Random, one: str, several: str) -> tuple[str, int, str]:
    """The words, the number and the item as written: ("a dozen rye scones", 12, "rye scones")."""
    form = rng.random()
    if form < 0.15:
        article = "an" if one[0] in "aeio" else "a"
        return f"{pick(rng, [article, 'one'])} {one}", 1, one
    if form < 0.25:
        words, number = pick(rng, [("a dozen", 12), ("half a dozen", 6), ("a couple of", 2)])
    elif form < 0.65:
        number = 2 + int(rng.random() * len(NUMBERS))
        words = NUMBERS[number - 2]
    else:
        number = 2 + int(rng.random() * 29)
        words = str(number)
    return f"{words} {several}", number, several


def day_phrase(rng: random.Random) -> tuple[str, str | None]:
    """The words, with a leading space, and the day in lower case; about a quarter say no day."""
    form = rng.random()
    if form < 0.25:
        return "", None
    if form < 0.40:
        day = pick(rng, ["today", "tomorrow"])
        return pick(rng, [" ", " for "]) + day, day
    day = pick(rng, WEEKDAYS)
    return pick(rng, [" on ", " for ", " this ", " next "]) + day, day.lower()


def make_request(rng: random.Random, vocabulary: Vocabulary) -> Request:
    action = pick(rng, ACTIONS)
    body = pick(rng, BODIES[action])
    thing, things = pick(rng, THINGS.split(",")).split()
    flavour = pick(rng, vocabulary.flavours)
    words, quantity, item = quantity_and_item(rng, f"{flavour} {thing}", f"{flavour} {things}")
    when, day = day_phrase(rng)
    name = pick(rng, vocabulary.names) if rng.random() < 0.75 else None
    record = {
        "action": action,
        "item": item if "{some}" in body else f"{flavour} {things}",
        "quantity": quantity if "{some}" in body else None,
        "day": day if "{when}" in body else None,
        "name": name,
    }
    text = body.format(some=words, items=f"{flavour} {things}", when=when)
    return Request(frame(rng, text, name), record)


def frame(rng: random.Random, text: str, name: str | None) -> str:
    """The request as a message: a greeting or none, the name before or after it, a closing or none."""
    greeting = pick(rng, GREETINGS) if rng.random() < 0.6 else ""
    introduction, signature = "", pick(rng, CLOSINGS) if rng.random() < 0.3 else ""
    if name and rng.random() < 0.5:
        introduction = pick(rng, INTRODUCTIONS).format(name=name)
    elif name:
        signature = pick(rng, SIGNATURES).format(name=name)
    start = introduction or text
    if greeting.endswith(", ") and not start.startswith(("I ", "I'", name or "I ")):
        start = start[0].lower() + start[1:]  # the sentence goes on after the comma
    else:
        start = start[0].upper() + start[1:]
    return greeting + start + (text if introduction else "") + signature


def make_split(
    rng: random.Random, number_of_rows: int, seen: set[str], vocabularies: list[Vocabulary]
) -> list[Request]:
    """Requests whose texts are not in `seen` (which grows), from each vocabulary in turn."""
    split: list[Request] = []
    while len(split) < number_of_rows:
        request = make_request(rng, vocabularies[len(split) % len(vocabularies)])
        if request.text not in seen:
            seen.add(request.text)
            split.append(request)
    return split


def write_split(path: Path, split: list[Request]) -> None:
    lines = []
    for request in split:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request.text},
            {"role": "assistant", "content": json.dumps(request.record, separators=(",", ":"))},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(lines).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the demo's training and held-out rows.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "requests")
    parser.add_argument("--train_rows", type=int, default=1200)
    parser.add_argument("--heldout_rows", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    rng = random.Random(options.seed)
    flavours, new_flavours = keep_out(rng, FLAVOURS.split(), share=0.1)
    names, new_names = keep_out(rng, NAMES.split(), share=0.1)
    known = Vocabulary(flavours, names)
    heldout_words = [known, Vocabulary(new_flavours, names), known, Vocabulary(flavours, new_names)]
    seen: set[str] = set()
    train = make_split(rng, options.train_rows, seen, [known])
    heldout = make_split(rng, options.heldout_rows, seen, heldout_words)
    write_split(options.output_dir / "train.jsonl", train)
    write_split(options.output_dir / "heldout.jsonl", heldout)
    print(f"{len(train)} training and {len(heldout)} held-out rows in {options.output_dir}")


if __name__ == "__main__":
    main()
