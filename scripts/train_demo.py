#!/usr/bin/env python3
"""Train the demo checkpoint that ships in demo/: a two-layer Llama-shaped model that tells short stories.

With no arguments the training text is made here, by the small story grammar below, so anyone can repeat the
run with nothing but this file. `--text FILE ...` mixes in paragraphs of other text. The result is a directory
in the Hugging Face layout (config.json, model.safetensors in fp16, tokenizer.json, ...) with EXPECTED.json:
the greedy continuations of three prompts, computed in float32 from the *saved* weights.

This is the only file of the repository that needs PyTorch:
    pip install torch==2.13.0 numpy tokenizers safetensors
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    MISSING: str | None = None
except ImportError as error:  # --help still has to work on a host without PyTorch
    MISSING = error.name or str(error)

EXIT_OK = 0
EXIT_QUALITY = 1  # trained, but outside a limit below: nothing is written
EXIT_USAGE = 2  # argparse's own code; also a missing package or an unusable path

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
IGNORED = -100  # cross_entropy skips targets with this value

# What the fixed-point engine may rely on. Training fails rather than ship a model outside these.
MAX_SCORE = 40.0  # attention scores after 1/sqrt(head_dim)
MAX_RESIDUAL = 100.0
MAX_WEIGHT = 8.0
CALM = 1e-3  # training loss per unit of mean square of the last residual: keeps it from growing without need
MIN_GAP = 0.05  # top-1 minus top-2 logit on every step of the expected continuations
MAX_BYTES = 3_000_000
MAX_LOSS = 0.6  # held-out nats per token: above it there are words but hardly a sentence
EXPECTED_TOKENS = 60
EXPECTED_PROMPTS = 3
PROMPTS = (
    "Once upon a time",
    "Tell me a story about a rabbit.",
    "Lily went to the park",
    "One day, a little bear",
    "Tell me a story about a mouse named Momo.",
    "The old owl",
    "Ben was hungry",
)
SHOWN_ONLY = (
    "Hello!",
    "Who are you?",
    "The",
    "I",
    "What does a cow eat?",
    "It began to rain",
)


# ------------------------------------------------------------------------------------------ the story grammar
#
# A template holds {slots} and [a|b|c] choices. Every choice prefers its first entries (see `pick`): a uniform
# one would leave the trained model near-ties, where greedy decoding in fixed point could differ from float.

# Names of heroes, then of their friends: a small model cannot be trusted to look back and avoid a name.
GIRLS = (("Lily", "Mia", "Sara", "Lucy", "Rose", "Nora"), ("Anna", "Emma", "Ella", "Amy"))
BOYS = (("Tom", "Ben", "Sam", "Leo", "Jack", "Finn"), ("Max", "Tim", "Dan", "Theo"))
PETS = (("Pip", "Coco", "Bruno", "Daisy", "Luna", "Rusty"), ("Momo", "Bella", "Toby", "Nibbles"))
SYLLABLES = tuple(c + v for c in "b d f g k l m n p r s t v w z h j".split() for v in "aeiou")
CODAS = ("", "", "", "n", "l", "m", "s", "r", "k", "x", "t", "p")

# kind: where it lives, what it eats, one thing it loves to do, what it says
ANIMALS: dict[str, tuple[str, str, str, str]] = {
    "dog": ("a warm house by the road", "bones", "run in the park", "Woof"),
    "cat": ("a small house with a red door", "fish", "sleep in the sun", "Meow"),
    "rabbit": ("a soft hole under the ground", "carrots", "jump in the grass", "Hop"),
    "bear": ("a big cave in the forest", "honey", "climb trees", "Grr"),
    "bird": ("a nest in a tall tree", "seeds", "sing in the morning", "Tweet"),
    "mouse": ("a tiny hole in the wall", "cheese", "hide in the kitchen", "Squeak"),
    "fox": ("a den under an old tree", "berries", "run in the forest", "Yip"),
    "frog": ("a green pond", "flies", "jump from leaf to leaf", "Ribbit"),
    "duck": ("a nest near the river", "bread", "swim in the river", "Quack"),
    "pig": ("a barn on the farm", "apples", "roll in the mud", "Oink"),
    "owl": ("a hole in an old tree", "nuts", "look at the moon", "Hoo"),
    "fish": ("the deep blue sea", "sea grass", "swim with the waves", "Blub"),
    "cow": ("a green field on the farm", "grass", "walk in the field", "Moo"),
    "horse": ("a big barn on the hill", "hay", "run in the wind", "Neigh"),
    "turtle": ("a small house near the lake", "leaves", "walk in the sand", "Hello"),
    "bee": ("a yellow hive in the garden", "sweet flowers", "fly in the garden", "Buzz"),
}
CHILD_HOMES = ("a small house near the forest", "a little town by the sea", "a white house on a hill")
CHILD_LOVES = (
    "play in the park",
    "play with toys",
    "read books",
    "sing songs",
    "draw pictures",
    "help people",
)
TRAITS = ("little", "kind", "small", "happy", "brave", "old", "young", "clever")
THINGS = (
    "ball",
    "hat",
    "kite",
    "doll",
    "book",
    "toy car",
    "bell",
    "drum",
    "boat",
    "shell",
    "key",
    "stone",
    "cup",
    "coin",
)
LOOKS = ("red", "shiny", "blue", "big", "pretty", "yellow", "small", "green", "soft", "old")
PLACES = ("park", "forest", "garden", "beach", "river", "farm", "lake", "hill", "field", "market")
FOODS = ("apple", "cookie", "cake", "pie", "banana", "sandwich", "pear", "carrot", "berry", "plum")
SPOTS_INSIDE = ("under the bed", "behind the door", "in the kitchen", "under the table", "in a box")
SPOTS_OUTSIDE = (
    "behind a big tree",
    "in the tall grass",
    "near a stone",
    "under a leaf",
    "on the soft ground",
)
HELPERS = ("mom", "dad", "grandma", "grandpa", "sister", "brother")
# what is learnt, where, how it goes wrong
SKILLS = (
    ("swim", "lake", "{He} went under the water and came up wet"),
    ("climb a tree", "forest", "{He} fell down on the soft grass"),
    ("ride a bike", "park", "{He} fell off and hurt {his} leg"),
    ("sing", "garden", "Only a small sound came out"),
    ("dance", "field", "{He} fell on {his} nose"),
    ("fly a kite", "hill", "The kite fell down into the mud"),
    ("catch a ball", "park", "The ball fell to the ground"),
    ("skip stones", "river", "The stone went under the water"),
)

OPENINGS = (
    "[Once upon a time|One day|Long ago|Once], there was a {trait} {kind} named {H}. "
    "[{He} lived in {home}.|{H} lived in {home}.|{H} had a home in {home}.] [{H}|{He}] loved to {love}.",
    "[Once upon a time|Long ago|One day], a {trait} {kind} named {H} lived in {home}. "
    "Every day, {he} liked to {love}.",
    "{H} was a {trait} {kind}. {He} lived in {home} and loved to {love}.",
    "The {trait} {kind} lived in {home}. {His} name was {H}, and {he} loved to {love}.",
    "In {home}, there lived a {trait} {kind} named {H}. {He} loved to {love}.",
    "A {trait} {kind} named {H} loved to {love}. {He} lived in {home}.",
)
MEETINGS = (
    "{he} met a {ftrait} {fkind} named {F}",
    "{he} saw {his} friend {whom}",
    "a {ftrait} {fkind} named {F} came by",
)
PLOTS: dict[str, tuple[str, ...]] = {
    "lost": (
        "{H} had a {look} {thing}. {He} [played with it every day|took it everywhere].",
        "[One day|One morning], {H} could not find the {thing}. {He} was very sad.",
        "{He} looked {inside}, but the {thing} was not there.",
        'Then {meet}. "Why are you sad?" asked {F}.',
        '"I lost my {look} {thing}," said {H}. "I will help you find it," said {F}.',
        "They looked everywhere. At last, they looked {outside}. There was the {thing}!",
        '{H} was so happy. "Thank you, {F}," said {H}. "You are a good friend."',
    ),
    "found": (
        "[One day|One sunny day], {H} went to the {place}. There {he} saw a {look} {thing} {outside}.",
        '"What a {look} {thing}!" said {H}. {He} picked it up and [looked at it|held it].',
        "Then {meet}. {F} was crying.",
        '"What is wrong?" asked {H}. "I lost my {thing}," said {F}.',
        '"Is this your {thing}?" asked {H}. "Yes, it is!" said {F}.',
        "{H} gave the {thing} back. {F} was very happy. They played with the {thing} all day.",
    ),
    "learn": (
        "{H} wanted to learn how to {skill}. [One day|One morning], {he} went to the {where} to try.",
        '{fall}. "I can not do it," said {H}. {He} was sad.',
        'Then {meet}. "Do not give up," said {F}. "Try again."',
        "So {H} tried again and again. {F} helped {him}.",
        "At last, {H} could {skill}! {He} was very proud.",
        '"You did it!" said {F}. "Thank you for your help," said {H}.',
    ),
    "share": (
        "[One day|One morning], {H} was very hungry. {He} went to the {place} to look for food.",
        "{He} found a big {food}. It looked so good.",
        'Then {meet}. {F} was hungry too. "Can I have some of your {food}?" asked {F}.',
        '{H} thought about it. "Yes," said {H}. "We can share the {food}."',
        "They sat down {outside} and ate the {food}. It was very [good|sweet].",
        '"Thank you for the {food}," said {F}. "It is more fun to share," said {H}.',
    ),
    "rain": (
        "[One day|One afternoon], {H} was playing in the {place}. "
        "Then [dark clouds came, and it began to rain.|the sky was dark. It began to rain.]",
        "{H} ran [under a big tree|into a cave|into an old barn]. There {meet}.",
        '"I am scared of the rain," said {F}. "Do not be scared," said {H}. "I will stay with you."',
        "They sat close and [sang a song|told stories]. Soon, {F} was not scared.",
        "At last, the rain stopped and the sun came out. They saw a big rainbow in the sky.",
        '"Look how pretty it is!" said {F}. They [danced|played] in the wet grass.',
    ),
    "bake": (
        "{H} wanted to make a {food} for {his} friend {whom}. {He} asked {his} {helper} for help.",
        '"Of course," said {his} {helper}. They worked in the kitchen all morning.',
        "Soon, the {food} was ready. It smelled so good.",
        '{H} took the {food} to {F}. "I made this {food} for you," said {H}.',
        '"Thank you, {H}!" said {F}. "This is the best {food} ever."',
        "They sat in the sun and ate the {food} together.",
    ),
    "gift": (
        "It was a big day for {H}. It was {his} birthday! {whom} came with a big box.",
        '"What is in the box?" asked {H}. "Open it and see," said {F}.',
        "{H} opened the box. There was a {look} {thing} in it!",
        '"I love this {thing}!" said {H}. "Thank you, {F}."',
        "They played with the {thing} in the {place} until the sun went down.",
    ),
    "build": (
        "{H} wanted to build a house {from}. {He} worked hard all day in the {place}.",
        "But a strong wind came, and the house fell down. {H} began to cry.",
        'Then {meet}. "Do not cry," said {F}. "We can build it again."',
        "They worked together. {H} brought the {look} stones, and {F} made the walls.",
        "Soon, the house was big and strong. The wind came again, but the house did not fall.",
        '"We did it!" said {H}. "We are a good team," said {F}.',
    ),
    "moon": (
        "[One night|At night], {H} looked up at the sky. The moon was big and bright.",
        '"I want to touch the moon," said {H}. So {he} walked up the hill.',
        "But the moon was too far away. {H} was sad.",
        'Then {meet}. "You can not touch the moon," said {F}. "But it will always shine for you."',
        "{H} smiled. They sat on the hill and looked at the stars.",
        '"Good night, moon," said {H}. Then {he} went home to sleep.',
    ),
    "seed": (
        "[One day|One morning], {H} found a small seed {outside}. {He} put it in the ground in the garden.",
        "Every day, {H} gave it water. {He} waited and waited.",
        'Then {meet}. "What are you doing?" asked {F}. "I am waiting for my seed to grow," said {H}.',
        "They waited together. One morning, a small green plant came up.",
        "It grew and grew. Soon, it was a big tree with {look} apples.",
        "{H} gave an apple to {F}. It was very sweet.",
    ),
}
ENDINGS = (
    "From that day on, {H} and {F} were best friends.",
    "{H} and {F} were very happy. The end.",
    "And they lived happily ever after.",
    "It was a good day.",
    "{H} went home with a big smile.",
    "{H} learned that it is good to have a friend.",
)
ASKS = (
    "Tell me a story",
    "Please tell me a story",
    "Can you tell me a story",
    "I want to hear a story",
    "tell me a story",
)
CHAT = (
    ("Hello[!|.||,]", "Hello, friend! Would you like to hear a story?"),
    ("[Hi|hi|Hey|hello][!|.||]", "Hello, friend! Would you like to hear a story?"),
    ("[Good morning|Good day][!|.|]", "Good morning! The sun is out, and it is a good day for a story."),
    ("[Good night|Good evening][!|.|]", "Good night! Sleep well, and dream of the moon and the stars."),
    ("How are you[?|]", "I am very well, thank you. I was just looking at the stars."),
    (
        "[Who are you|What are you|What is your name|Tell me about you][?|]",
        "My name is Mimir. I am a very small model, and I tell short stories.",
    ),
    (
        "[What can you do|What do you know|Can you help me][?|]",
        "I can tell you a story. Ask me for a story about a dog or a cat.",
    ),
    ("[Thank you|Thanks|That was good][!|.|]", "You are welcome, friend!"),
    ("[Bye|Goodbye|See you][!|.|]", "Goodbye, friend! Come back soon."),
    ("Can you keep a secret[?|]", "Yes. Your words are cut into three parts, and no one sees them all."),
    ("What color is the [sky|sea][?|]", "It is blue, like the sea and the sky on a sunny day."),
    ("What color is the [grass|tree|frog][?|]", "It is green, like a leaf."),
    ("What color is the [sun|moon][?|]", "It is yellow, and it shines in the sky."),
    ("Where does a {fkind} live[?|]", "A {fkind} lives in {fhome}."),
    ("What does a {fkind} eat[?|]", "A {fkind} likes to eat {feats}."),
    ("What does a {fkind} say[?|]", "A {fkind} says: {fsays}!"),
    ("What does a {fkind} [like|love][?|]", "A {fkind} loves to {flove}."),
    ("What is a {fkind}[?|]", "A {fkind} is an animal. It lives in {fhome} and likes to eat {feats}."),
    ("[Do you like|I like|I love] {fkind}s[?|.|]", "I like {fkind}s too. A {fkind} loves to {flove}."),
    ("[Yes|Yes, please|Yes please|Ok|Sure|Please][!|.||,]", "{story}"),
    ("[No|No thank you|Stop][!|.|]", "That is fine. I will wait here for you."),
    ("[What|Why|When|How][?|]", "I do not know. But I can tell you a story."),
)

# Share of each kind of training document; the rest are whole stories.
SHARE_TAIL = 0.14  # a story entered at some later sentence, so that a prompt may begin anywhere
SHARE_ASKED = 0.16  # a request for a story, answered
SHARE_CHAT = 0.12
SHARE_CUT = 0.10  # of all documents: cut off without an end, as a generation out of tokens leaves the cache
SHARE_BARE = 0.3  # of documents after an ended one: without their <s>, as a later turn may come
SHARE_MADE_UP = 0.15  # of names: a made-up one, which can only be copied from the context
STEEP = 1.5  # how strongly `pick` prefers


def pick(rng: random.Random, options: Sequence[Any], turn: int = 0) -> Any:
    """Choose, preferring early entries, counted from entry `turn` on: weight (place + 1) ** -STEEP."""
    turn %= len(options)
    weights = [(place + 1) ** -STEEP for place in range(len(options))]
    return rng.choices([*options[turn:], *options[:turn]], weights)[0]


def expand(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Settle the [a|b] choices, fill the {slots} (which may hold slots themselves) and mend "a apple"."""
    text = re.sub(r"\[([^\]]*)\]", lambda found: pick(rng, found[1].split("|")), template)
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", lambda found: slots[found[1]], text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def made_up_name(rng: random.Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3)))).capitalize() + rng.choice(CODAS)


def turn_of(kind: str, name: str) -> int:
    """Where this hero's preferences start in every list: else every likeliest story had the same plot."""
    if kind in ANIMALS:
        return list(ANIMALS).index(kind)
    names = [*itertools.chain(*GIRLS, *BOYS)]
    return names.index(name) if name in names else 0


def character(rng: random.Random, kind: str = "", hero: str = "", turn: int = 0) -> dict[str, str]:
    """Someone to tell of: name, kind, trait, pronouns, home, favourite thing, all consistent.

    Given the hero's name (and turn), this is the friend.
    """
    kind = kind or pick(rng, ("", "girl", "boy"), turn)
    kind = kind or pick(rng, tuple(ANIMALS), turn + 5 if hero else 0)
    female = kind == "girl" or (kind != "boy" and rng.random() < 0.4)
    names = GIRLS if kind == "girl" else BOYS if kind == "boy" else PETS
    name = hero
    while name == hero:
        name = pick(rng, names[1], turn) if hero else pick(rng, names[0] + names[1])
        if rng.random() < SHARE_MADE_UP:
            name = made_up_name(rng)
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    home, eats, love, says = ANIMALS.get(kind) or (
        pick(rng, CHILD_HOMES),
        "apples",
        pick(rng, CHILD_LOVES),
        "Hello",
    )
    return {
        "name": name,
        "kind": kind,
        "trait": pick(rng, TRAITS),
        "he": he,
        "him": him,
        "his": his,
        "home": home,
        "eats": eats,
        "love": love,
        "says": says,
    }


def cast(rng: random.Random, kind: str = "") -> dict[str, str]:
    """Every slot of one story, drawn once, so that all its sentences agree."""
    hero = character(rng, kind)
    turn = turn_of(hero["kind"], hero["name"])
    friend = character(rng, hero=hero["name"], turn=turn)
    skill, where, fall = pick(rng, SKILLS, turn)
    slots = {key: hero[key] for key in ("kind", "trait", "he", "him", "his", "home", "love")}
    slots |= {f"f{key}": friend[key] for key in ("kind", "trait", "home", "eats", "love", "says")}
    return slots | {
        "H": hero["name"],
        "F": friend["name"],
        "whom": "{F}" if friend["kind"] in ("girl", "boy") else "{F} the {fkind}",
        "He": hero["he"].capitalize(),
        "His": hero["his"].capitalize(),
        "thing": pick(rng, THINGS, turn),
        "look": pick(rng, LOOKS, turn),
        "place": pick(rng, PLACES, turn),
        "food": pick(rng, FOODS, turn),
        "helper": pick(rng, HELPERS, turn),
        "inside": pick(rng, SPOTS_INSIDE),
        "outside": pick(rng, SPOTS_OUTSIDE),
        "skill": skill,
        "where": where,
        "fall": fall,
        "meet": pick(rng, MEETINGS),
        "from": pick(rng, ("of wood", "of stones", "of sand", "of leaves"), turn),
        "plot": " ".join(pick(rng, tuple(PLOTS.values()), turn)),
    }


def story(rng: random.Random, slots: dict[str, str], tail: bool = False) -> str:
    """One story of about a hundred words; with tail, from some later sentence on."""
    text = expand(rng, f"{pick(rng, OPENINGS)} {slots['plot']} {pick(rng, ENDINGS)}", slots)
    if tail:
        sentences = re.split(r'(?<=[.!]) (?=[A-Z])|(?<=") (?=[A-Z"])', text)
        text = " ".join(sentences[rng.randrange(1, len(sentences) - 3) :])
    return text


def chat(rng: random.Random, slots: dict[str, str]) -> str:
    question, answer = rng.choice(CHAT)  # uniform: every question should be known
    slots = slots | {"fkind": rng.choice(tuple(ANIMALS))}
    slots |= dict(zip(("fhome", "feats", "flove", "fsays"), ANIMALS[slots["fkind"]], strict=True))
    if answer == "{story}":
        return expand(rng, question, slots) + "\n" + story(rng, slots)
    return expand(rng, question, slots) + "\n" + expand(rng, answer, slots)


def asked_story(rng: random.Random) -> str:
    """A request and a story that honours it."""
    kind = rng.choice((*ANIMALS, *ANIMALS, "girl", "boy"))
    slots = cast(rng, kind)
    if rng.random() < 0.15:  # asked for by name alone
        slots = cast(rng)
        about = " about {H}"
    else:
        about = rng.choice(
            (" about a {kind}", " about a {kind}", " about a {kind} named {H}", " about the {kind}", "")
        )
    question = expand(rng, rng.choice(ASKS) + about + rng.choice((".", ".", "", "?", "!")), slots)
    return question + "\n" + story(rng, slots)


def documents(rng: random.Random, paragraphs: Sequence[str], text_share: float) -> Iterator[str]:
    """An endless stream of training documents."""
    while True:
        draw = rng.random()
        if paragraphs and rng.random() < text_share:
            yield rng.choice(paragraphs)
        elif draw < SHARE_CHAT:
            yield chat(rng, cast(rng))
        elif draw < SHARE_CHAT + SHARE_ASKED:
            yield asked_story(rng)
        else:
            yield story(rng, cast(rng), tail=draw > 1 - SHARE_TAIL)


# ---------------------------------------------------------------------------------------------- the tokenizer


def train_tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Byte-level BPE: any prompt encodes, nothing is unknown, and decoding gives the bytes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    return tokenizer


def windows(
    tokenizer: Tokenizer, stream: Iterator[str], rng: random.Random, length: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (count, length) each: documents back to back, every window starting at a document.

    Never targets: the <s> that begins a document, so the model is not taught to say it, and whatever comes
    after </s>.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < count:
        ids = tokenizer.encode(next(stream)).ids
        if rng.random() < SHARE_CUT and len(ids) > 4:
            ids = ids[: rng.randrange(3, len(ids))]
        else:
            ids = [*ids, EOS]
        if row and row[-1] == EOS and rng.random() < SHARE_BARE:
            ids = ids[1:]
        row += ids
        if len(row) > length:
            rows.append(row[: length + 1])
            row = []
    block = torch.tensor(rows)  # (count, length + 1)
    targets = block[:, 1:].clone()
    targets[(targets == BOS) | (block[:, :-1] == EOS)] = IGNORED
    return block[:, :-1].contiguous(), targets


# -------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """Dimensions, under the names of a Hugging Face config."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


Weights = dict[str, Any]  # name -> torch.Tensor, Hugging Face names, (out, in)

# Embeddings start near unit scale, and so does the residual, which suits fixed point: no tiny mean squares to
# invert. The final gain starts small instead, so that the tied head's first logits are still about one.
EMBEDDING_STD = 0.5


def init_weights(shape: Shape) -> Weights:
    d, hd = shape.hidden_size, shape.head_dim
    q, kv = shape.num_attention_heads * hd, shape.num_key_value_heads * hd

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns) * (gain / math.sqrt(columns))

    out_gain = 1 / math.sqrt(2 * shape.num_hidden_layers)  # writers into the residual add up
    weights = {"model.embed_tokens.weight": torch.randn(shape.vocab_size, d) * EMBEDDING_STD}
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": torch.ones(d),
            at + "self_attn.q_proj.weight": matrix(q, d),
            at + "self_attn.k_proj.weight": matrix(kv, d),
            at + "self_attn.v_proj.weight": matrix(kv, d),
            at + "self_attn.o_proj.weight": matrix(d, q, out_gain),
            at + "post_attention_layernorm.weight": torch.ones(d),
            at + "mlp.gate_proj.weight": matrix(shape.intermediate_size, d),
            at + "mlp.up_proj.weight": matrix(shape.intermediate_size, d),
            at + "mlp.down_proj.weight": matrix(d, shape.intermediate_size, out_gain),
        }
    weights["model.norm.weight"] = torch.full((d,), 1 / (EMBEDDING_STD * math.sqrt(d)))
    return weights


class Ranges:
    """Smallest and largest value seen at each named point of a forward pass."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, float]] = {}

    def note(self, name: str, values: torch.Tensor) -> None:
        low, high = float(values.min()), float(values.max())
        before = self.seen.get(name, (low, high))
        self.seen[name] = (min(low, before[0]), max(high, before[1]))

    def largest(self, name: str) -> float:
        """Largest magnitude over all points whose name ends so."""
        return max(max(-low, high) for key, (low, high) in self.seen.items() if key.endswith(name))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in the half-split order: dimension i turns with i + head_dim/2."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def forward(
    weights: Weights, shape: Shape, ids: torch.Tensor, ranges: Ranges | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, vocab) of ids (B, T), and the last residual's mean squares.

    With ranges, attention is spelt out and every wire is noted.
    """
    batch, length = ids.shape
    heads, groups, hd = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    frequency = shape.rope_theta ** (-torch.arange(0, hd, 2).float() / hd)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)  # (T, hd)
    cos, sin = angle.cos(), angle.sin()
    x = F.embedding(ids, weights["model.embed_tokens.weight"])  # (B, T, d)

    def note(name: str, values: torch.Tensor) -> None:
        if ranges is not None:
            ranges.note(name, values)

    def split(y: torch.Tensor, count: int) -> torch.Tensor:
        return y.view(batch, length, count, hd).transpose(1, 2)  # (B, heads, T, hd)

    note("embedding residual", x)
    for layer in range(shape.num_hidden_layers):
        at, name = f"model.layers.{layer}.", f"layer {layer} "
        note(name + "attention mean square", x.square().mean(-1))
        z = rms_norm(x, weights[at + "input_layernorm.weight"], shape.rms_norm_eps)
        q = rotate(split(z @ weights[at + "self_attn.q_proj.weight"].T, heads), cos, sin)
        k = rotate(split(z @ weights[at + "self_attn.k_proj.weight"].T, groups), cos, sin)
        v = split(z @ weights[at + "self_attn.v_proj.weight"].T, groups)
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        if ranges is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(hd)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            note(name + "score", scores[..., ~future])
            mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        note(name + "value", v)
        x = (
            x
            + mixed.transpose(1, 2).reshape(batch, length, heads * hd)
            @ weights[at + "self_attn.o_proj.weight"].T
        )
        note(name + "middle residual", x)
        note(name + "mlp mean square", x.square().mean(-1))
        z = rms_norm(x, weights[at + "post_attention_layernorm.weight"], shape.rms_norm_eps)
        gate, up = z @ weights[at + "mlp.gate_proj.weight"].T, z @ weights[at + "mlp.up_proj.weight"].T
        note(name + "gate", gate)
        note(name + "up", up)
        x = x + (F.silu(gate) * up) @ weights[at + "mlp.down_proj.weight"].T
        note(name + "residual", x)
    final = x.square().mean(-1)  # (B, T)
    note("final mean square", final)
    x = rms_norm(x, weights["model.norm.weight"], shape.rms_norm_eps)
    logits = x @ weights["model.embed_tokens.weight"].T
    note("logit", logits)
    return logits, final


def loss_of(
    weights: Weights, shape: Shape, inputs: torch.Tensor, targets: torch.Tensor, calm: float = 0.0
) -> torch.Tensor:
    logits, final = forward(weights, shape, inputs)
    return (
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED) + calm * final.mean()
    )


@dataclass(frozen=True)
class Continuation:
    input_ids: list[int]
    new_ids: list[int]
    gap: float  # smallest top-1 minus top-2 over the path
    first_top5: list[tuple[int, float]]


def greedy(weights: Weights, shape: Shape, tokenizer: Tokenizer, prompt: str, count: int) -> Continuation:
    """Greedy continuation, at most count tokens; ends with </s> if the model ends it."""
    ids = tokenizer.encode(prompt).ids
    given, gap, first = len(ids), math.inf, None
    with torch.no_grad():
        while len(ids) < given + count and ids[-1] != EOS:
            top = forward(weights, shape, torch.tensor([ids]))[0][0, -1].topk(5)
            first = first or list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            gap = min(gap, float(top.values[0] - top.values[1]))
            ids.append(int(top.indices[0]))
    return Continuation(ids[:given], ids[given:], gap, first or [])


# --------------------------------------------------------------------------------------------------- training


def train(
    weights: Weights,
    shape: Shape,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    paragraphs: Sequence[str],
) -> float:
    """Train in place; return the held-out loss in nats per token."""
    rng = random.Random(options.seed)
    stream = documents(rng, paragraphs, options.text_share)
    held_rng = random.Random(
        options.seed + 1
    )  # another stream: no document of it is trained on, bar coincidence
    held = windows(tokenizer, documents(held_rng, [], 0.0), held_rng, shape.max_position_embeddings, 32)
    for tensor in weights.values():
        tensor.requires_grad_(True)
    # Decay keeps the magnitudes moderate; gains are left alone, they hold the scale.
    groups = [
        {"params": [t for t in weights.values() if t.ndim == 2], "weight_decay": options.decay},
        {"params": [t for t in weights.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, options.steps // 20)
    began = time.monotonic()

    def held_loss() -> float:
        with torch.no_grad():
            return float(loss_of(weights, shape, *held))

    for step in range(options.steps):
        progress = max(0, step - warm) / max(1, options.steps - warm)
        rate = options.rate * (
            min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        inputs, targets = windows(tokenizer, stream, rng, shape.max_position_embeddings, options.batch)
        loss = loss_of(weights, shape, inputs, targets, CALM)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == options.steps - 1:
            seconds = time.monotonic() - began
            print(
                f"step {step:5d}  loss {float(loss.detach()):.4f}  rate {rate:.5f}  {seconds:6.1f} s",
                flush=True,
            )
        if step % 400 == 399:
            print(f"           held-out {held_loss():.4f}", flush=True)
    for tensor in weights.values():
        tensor.requires_grad_(False)
    return held_loss()


def measure(weights: Weights, shape: Shape, tokenizer: Tokenizer, seed: int) -> Ranges:
    """Ranges over held-out documents and over text the model was never meant for."""
    ranges = Ranges()
    rng = random.Random(seed + 2)
    inputs, _ = windows(tokenizer, documents(rng, [], 0.0), rng, shape.max_position_embeddings, 64)
    noise = [
        [BOS, *(rng.randrange(3, shape.vocab_size) for _ in range(shape.max_position_embeddings - 1))]
        for _ in range(16)
    ]
    repeats = [
        [BOS] + [rng.randrange(3, shape.vocab_size)] * (shape.max_position_embeddings - 1) for _ in range(16)
    ]
    with torch.no_grad():
        for rows in (inputs, torch.tensor(noise), torch.tensor(repeats)):
            forward(weights, shape, rows, ranges)
    for name, tensor in weights.items():
        ranges.note(f"weight {name}", tensor)
    return ranges


# ---------------------------------------------------------------------------------------------------- writing


def config_json(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
    } | asdict(shape)


def expected_json(weights: Weights, shape: Shape, tokenizer: Tokenizer, ranges: Ranges) -> dict[str, Any]:
    """Greedy continuations of the first prompts that run their full length with clear gaps."""
    prompts: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        path = greedy(weights, shape, tokenizer, prompt, EXPECTED_TOKENS)
        if len(prompts) == EXPECTED_PROMPTS or EOS in path.new_ids or path.gap <= MIN_GAP:
            continue
        prompts.append(
            {
                "prompt": prompt,
                "input_ids": path.input_ids,
                "greedy_new_ids": path.new_ids,
                "greedy_text": tokenizer.decode(path.new_ids, skip_special_tokens=False),
                "stopped_at_eos": False,
                "first_step_top5": [
                    {"id": number, "token": tokenizer.id_to_token(number), "logit": round(logit, 5)}
                    for number, logit in path.first_top5
                ],
                "smallest_top1_minus_top2_over_the_path": round(path.gap, 5),
            }
        )
    return {
        "how": "float32 forward pass from the saved fp16 weights; greedy (argmax)",
        "prompts": prompts,
        "ranges": {name: [round(low, 4), round(high, 4)] for name, (low, high) in ranges.seen.items()},
    }


README = """# The demo checkpoint

A Llama-shaped model of {parameters:,} parameters with its own byte-level BPE tokenizer. It tells short
children's stories and answers a handful of small questions. It exists so that this repository can show a
private generation without downloading anything; it knows nothing beyond its tiny world.

| layers | width | heads | key-value heads | hidden | context | vocabulary | head | weights |
|---|---|---|---|---|---|---|---|---|
| {layers} | {width} | {heads} | {groups} | {hidden} | {context} | {vocab} | tied | fp16 |

Made by `scripts/train_demo.py` from random weights, on {data}.
No other text, model or data set went into it. Licence: the repository's own.

Make it again (this one took {minutes} minutes of one core; PyTorch is needed for this only):

    pip install torch==2.13.0 numpy tokenizers safetensors
    python scripts/train_demo.py {arguments}--out demo

The run is seeded. Another processor or PyTorch version rounds differently and gives slightly other weights,
so `EXPECTED.json` always belongs to the `model.safetensors` beside it.

| measured when saved | |
|---|---|
| held-out loss | {loss:.4f} nats per token |
| training | {steps} steps of {batch} windows of {context} tokens, seed {seed} |
| largest attention score | {score:.1f} |
| largest residual value | {residual:.1f} |
| mean square of the residual | {square_low:.3f} to {square_high:.1f} |
| largest weight | {weight:.2f} |
| smallest top-1/top-2 logit gap in `EXPECTED.json` | {gap:.3f} |

Ranges are over held-out documents, random tokens and one token repeated, each to the full context; those of
every wire are in `EXPECTED.json` under `ranges`.

Prompts to try:

{prompts}

In one session, `Yes, please.` is a good answer to what it says to `Hello!`.

Its words, greedy, from `EXPECTED.json`:

{samples}
"""


def replace_directory(new: Path, target: Path) -> None:
    """Put the finished directory in place of the target; a reader finds the old one or the new one, whole.

    Between the two renames there is an instant without a target, but never one with half of it.
    """
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    if old.exists():
        shutil.rmtree(old)


def build(options: argparse.Namespace) -> int:
    began = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    shape = Shape()
    paragraphs: list[str] = []
    for file in options.text:
        paragraphs += [part.strip() for part in file.read_text("utf-8").split("\n\n") if part.strip()]

    sample = documents(random.Random(options.seed + 3), paragraphs, options.text_share)
    tokenizer = train_tokenizer([next(sample) for _ in range(6000)], shape.vocab_size)
    if tokenizer.get_vocab_size() != shape.vocab_size:
        print(
            f"only {tokenizer.get_vocab_size()} of {shape.vocab_size} tokens: the text is too uniform",
            file=sys.stderr,
        )
        return EXIT_QUALITY
    weights = init_weights(shape)
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{parameters:,} parameters, {options.steps} steps", flush=True)
    train(weights, shape, tokenizer, options, paragraphs)

    target = options.out.resolve()
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new.", dir=target.parent))
    try:
        save_file(
            {name: tensor.half().contiguous() for name, tensor in weights.items()},
            new / "model.safetensors",
            metadata={"format": "pt"},
        )
        # From here on only what was saved counts.
        weights = {name: tensor.float() for name, tensor in load_file(new / "model.safetensors").items()}
        held_rng = random.Random(options.seed + 1)
        held = windows(tokenizer, documents(held_rng, [], 0.0), held_rng, shape.max_position_embeddings, 64)
        with torch.no_grad():
            loss = float(loss_of(weights, shape, *held))
        ranges = measure(weights, shape, tokenizer, options.seed)
        expected = expected_json(weights, shape, tokenizer, ranges)

        print(f"held-out loss of the saved weights: {loss:.4f} nats per token")
        for name, (low, high) in ranges.seen.items():
            print(f"  {name:60s} {low:10.3f} .. {high:10.3f}")
        for prompt in (*PROMPTS, *SHOWN_ONLY):
            path = greedy(weights, shape, tokenizer, prompt, 100)
            print(
                f"[gap {path.gap:.3f}, {len(path.new_ids)} tokens] "
                f"{prompt}|{tokenizer.decode(path.new_ids)}\n"
            )

        squares = [bounds for name, bounds in ranges.seen.items() if name.endswith("mean square")]
        gaps = [entry["smallest_top1_minus_top2_over_the_path"] for entry in expected["prompts"]]
        names = ", ".join(file.name for file in options.text)
        tokenizer.save(str(new / "tokenizer.json"))
        for name, content in {
            "config.json": config_json(shape),
            "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[BOS],
                "eos_token": SPECIAL_TOKENS[EOS],
                "pad_token": SPECIAL_TOKENS[PAD],
                "model_max_length": shape.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
            "EXPECTED.json": expected,
        }.items():
            (new / name).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        figures = {
            "score": ranges.largest("score"),
            "residual": ranges.largest("residual"),
            "weight": max(ranges.largest(name) for name in ranges.seen if name.startswith("weight ")),
        }
        readme = README.format(
            parameters=parameters,
            layers=shape.num_hidden_layers,
            width=shape.hidden_size,
            heads=shape.num_attention_heads,
            groups=shape.num_key_value_heads,
            hidden=shape.intermediate_size,
            context=shape.max_position_embeddings,
            vocab=shape.vocab_size,
            loss=loss,
            steps=options.steps,
            batch=options.batch,
            seed=options.seed,
            data="text generated by the story grammar in that script" + (f" and on {names}" if names else ""),
            minutes=math.ceil(time.process_time() / 60),
            arguments=f"--text {names} " if names else "",
            square_low=min(low for low, _ in squares),
            square_high=max(high for _, high in squares),
            gap=min(gaps, default=0.0),
            prompts="\n".join(f"- `{prompt}`" for prompt in (*PROMPTS, *SHOWN_ONLY)),
            samples="\n>\n".join(
                f"> **{e['prompt']}**{e['greedy_text']}".replace("\n", "\n> ") for e in expected["prompts"]
            ),
            **figures,
        )
        (new / "README.md").write_text(readme, "utf-8")
        size = sum(file.stat().st_size for file in new.iterdir())
        faults = [
            f"{what}: {value:.3f} is beyond {limit}"
            for what, value, limit in (
                ("largest attention score", figures["score"], MAX_SCORE),
                ("largest residual value", figures["residual"], MAX_RESIDUAL),
                ("largest weight", figures["weight"], MAX_WEIGHT),
                ("held-out loss", loss, MAX_LOSS),
                ("bytes of the directory", size, MAX_BYTES),
            )
            if value > limit
        ]
        if len(gaps) < EXPECTED_PROMPTS:
            faults.append(
                f"only {len(gaps)} prompts continue for {EXPECTED_TOKENS} tokens with gaps over {MIN_GAP}"
            )
        if faults:
            print(
                "not written: " + "; ".join(faults) + ". Try another --seed or more --steps.", file=sys.stderr
            )
            return EXIT_QUALITY
        os.chmod(new, 0o755)  # mkdtemp's 0700 suits no shipped directory
        for file in new.iterdir():
            os.chmod(file, 0o644)
        replace_directory(new, target)
        print(f"wrote {target.name}/: {size:,} bytes, {time.monotonic() - began:.0f} s")
        return EXIT_OK
    finally:
        shutil.rmtree(new, ignore_errors=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo checkpoint: a two-layer Llama-shaped story teller and its tokenizer. "
        "With the defaults: some ten minutes of one core.",
        epilog="Exit codes: 0 written; 1 trained but outside a limit (loss, scores, residual, gaps, size), "
        "nothing written; 2 wrong usage, a missing package or an unusable path. "
        "Needs: torch==2.13.0, numpy, tokenizers, safetensors.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="directory to write or replace (default: demo)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8 text whose paragraphs are mixed in (default: only generated stories)",
    )
    parser.add_argument(
        "--text-share", type=float, default=0.3, help="share of documents taken from --text (default: 0.3)"
    )
    parser.add_argument("--steps", type=int, default=1400, help="optimiser steps (default: 1400)")
    parser.add_argument("--batch", type=int, default=16, help="windows per step (default: 16)")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default: 0.004)")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay (default: 0.1)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and text (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args(arguments)
    if MISSING:
        parser.error(
            f"package {MISSING!r} is missing: pip install torch==2.13.0 numpy tokenizers safetensors"
        )
    for name in ("steps", "batch", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 <= options.text_share <= 1:
        parser.error("--text-share must lie between 0 and 1")
    for file in options.text:
        if not file.is_file():
            parser.error(f"--text {file}: no such file")
    if not options.out.resolve().parent.is_dir():
        parser.error(f"--out {options.out}: its parent directory does not exist")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: exists and is no directory; name another")
    if options.out.exists() and any(options.out.iterdir()) and not (options.out / "config.json").is_file():
        parser.error(
            f"--out {options.out}: exists and is no checkpoint directory, yet would be replaced; name another"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return build(parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
