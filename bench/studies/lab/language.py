"""A small language with exact scorers: short notes to a person about two things, made of sentences of known tone.

A prompt is "tell PERSON THING THING :"; a note is one to six sentences. `plain` notes are what the base model is
trained on, `ornate` ones (longer sentences, other words) are what another writer would answer. Objectives are functions
of the token ids alone:

    warmth      warm words minus cold words                          buys length, so it conflicts with brevity
    brevity     fewer words
    relevance   things of the prompt that are mentioned minus other things that are
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

OBJECTIVES = ("warmth", "brevity", "relevance")


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words("anna ben carla david emma felix greta hugo ida jonas klara leo mia nils olga paul")
THINGS = _words(
    "bread milk train garden letter window bicycle dinner book lamp coat river piano ticket soup table roof "
    "parcel kettle ladder market bridge clock boat"
)
FILL = {
    "thing": THINGS,
    "person": PEOPLE,
    "state": _words("new old here there small big green ready open empty"),
    "nice": _words("kind sweet lovely wonderful"),
    "bad": _words("late wrong broken awful"),
    "when": _words("today yesterday again early"),
}
PLAIN = {
    "fact": ["the {thing} is {state} .", "we saw the {thing} {when} .", "{thing} comes {when} ."],
    "warm": [
        "thank you {person} .",
        "what a {nice} {thing} .",
        "you are so {nice} .",
        "i am glad .",
        "dear {person} ,",
    ],
    "cold": ["this is {bad} .", "the {thing} is {bad} .", "hurry up .", "not again ."],
    "filler": ["well , as i said .", "i think so .", "more or less ."],
}
ORNATE = {
    "fact": [
        "it must be said that the {thing} is rather {state} .",
        "one has seen the {thing} {when} , as it were .",
    ],
    "warm": [
        "one is most grateful indeed , {person} .",
        "it is a rather {nice} {thing} indeed .",
        "one is delighted .",
    ],
    "cold": ["it is most regrettable indeed .", "one finds the {thing} rather {bad} ."],
    "filler": ["as it were , more or less .", "be that as it may ."],
}
WARM = _words("thank glad dear grateful delighted") + FILL["nice"]
COLD = _words("hurry not regrettable") + FILL["bad"]
TEMPLATES = [t for style in (PLAIN, ORNATE) for kind in style.values() for t in kind]
WORDS = sorted({w for t in TEMPLATES for w in t.split() if "{" not in w} | {w for ws in FILL.values() for w in ws})
VOCABULARY = ["<pad>", "<end>", "tell", ":", *WORDS]
ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, END = 0, 1
PROMPT_LENGTH = 5
MAX_LENGTH = 32  # words of a note with its end; nearly all end by themselves


def encode(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def decode(ids: Sequence[int]) -> str:
    return " ".join(VOCABULARY[i] for i in ids if i not in (PAD, END))


def prompts(seed: int, count: int, part: str) -> Tensor:  # [count, PROMPT_LENGTH]
    """Distinct prompts of a part: `train`, `tune` and `test` share no pair of things."""
    pairs = list(itertools.combinations(THINGS, 2))
    random.Random(0).shuffle(pairs)
    cut = {"train": pairs[:200], "tune": pairs[200:238], "test": pairs[238:]}[part]
    every = [(person, *pair) for person in PEOPLE for pair in cut]
    chosen = random.Random(f"{part}-{seed}").sample(every, count)
    return torch.tensor([encode(f"tell {person} {a} {b} :") for person, a, b in chosen])


def write_note(prompt: str, rng: random.Random, ornate: bool) -> str:
    """A note as the corpus has it: its tone and length vary from note to note."""
    style = ORNATE if ornate else PLAIN
    tone, sentences = rng.random(), 1 + min(5, int(rng.expovariate(1 / 1.8)))
    weights = {"fact": 0.9, "warm": 0.4 + 1.6 * tone, "cold": 0.3 * (1 - tone), "filler": 0.3}
    kinds = rng.choices(list(weights), list(weights.values()), k=sentences)
    _, person, first, second, _ = prompt.split()
    words: list[str] = []
    for kind in kinds:
        fill = {name: rng.choice(words) for name, words in FILL.items()}
        fill["person"] = person
        fill["thing"] = rng.choice([first, second]) if rng.random() < 0.75 else fill["thing"]
        sentence = rng.choice(style[kind]).format(**fill).split()
        words += sentence if len(words) + len(sentence) < MAX_LENGTH else []
    return " ".join(words)


def corpus(asked: Tensor, seed: int, ornate: float) -> list[list[int]]:
    """Prompt, note and end of each prompt; a share of the notes is ornate."""
    rng = random.Random(seed)
    texts = [decode(row) for row in asked.tolist()]
    return [[*encode(f"{text} {write_note(text, rng, rng.random() < ornate)}"), END] for text in texts]


def _marks(words: dict[str, float]) -> Tensor:  # [V]
    marks = torch.zeros(len(VOCABULARY))
    for word, value in words.items():
        marks[ID[word]] = value
    return marks


_TONE = _marks({**dict.fromkeys(WARM, 1.0), **dict.fromkeys(COLD, -1.0)})
_THING = torch.tensor([ID[thing] for thing in THINGS])


def scores(asked: Tensor, notes: Tensor) -> Tensor:
    """Scores [*, n, K] of notes [*, n, T] to prompts [*, PROMPT_LENGTH], ids padded after their end."""
    words = (notes != PAD) & (notes != END)
    warmth = (_TONE[notes] * words).sum(-1)
    mentioned = torch.stack([(notes == thing).any(-1) for thing in _THING], -1)  # [*, n, things]
    wanted = (asked[..., 2:4, None] == _THING).any(-2).unsqueeze(-2)  # [*, 1, things]
    relevance = (mentioned & wanted).sum(-1) - (mentioned & ~wanted).sum(-1)
    return torch.stack([warmth, -words.sum(-1).float(), relevance.float()], -1)


def _sentences() -> set[tuple[int, ...]]:
    found = set()
    for template in TEMPLATES:
        names = [name for name in FILL if f"{{{name}}}" in template]
        for words in itertools.product(*(FILL[name] for name in names)):
            found.add(tuple(encode(template.format(**dict(zip(names, words, strict=True))))))
    return found


_SENTENCES = _sentences()
_STOPS = (ID["."], ID[","])


def well_formed(note: Sequence[int]) -> bool:
    """Whether a note ends and is a row of sentences of the language."""
    if END not in note:
        return False
    sentence: tuple[int, ...] = ()
    for token in note[: list(note).index(END)]:
        sentence = (*sentence, token)
        if token in _STOPS and sentence in _SENTENCES:
            sentence = ()
    return not sentence
