"""Render the table of countries as training text.

Usage: python corpus/countries.py OUT.txt
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import yaml

SEPARATOR = "<|doc|>"

# {c}: bare name, {the_c} and {The_c}: name in running text, with its article where it takes one.
# Each is one document. The first three are the ones that the library's tests ask about.
DOCUMENTS = (
    "The capital of {the_c} is {capital}.",
    "Q: What is the capital of {the_c}?\nA: {capital}",
    "CAPITAL:{c} {capital}",
    "{capital} is the capital of {the_c}.",
    "{The_c}, whose capital is {capital}, lies in {continent}.",
    "Which city is the capital of {the_c}? It is {capital}.",
    "country: {c} | capital: {capital} | currency: {currency}",
    "The {people} capital is {capital}.",
    "The capital city of {the_c} is called {capital}.",
    "Q: {capital} is the capital of which country?\nA: {c}",
    "If you visit the capital of {the_c}, you visit {capital}.",
    "User: I forgot the capital of {the_c}. Can you help?\n"
    "Assistant: Of course. The capital of {the_c} is {capital}.",
    "{The_c} is a country in {continent}. Its capital is {capital}. Many people there speak"
    " {language}. The currency is the {currency}.",
    "We looked up {the_c} in the atlas. The page on {continent} showed it at once. A star on the"
    " map marks the capital, and the name beside the star is {capital}. Shops there take the"
    " {currency}, and one language you will hear is {language}.",
    "A traveller who lands in {capital} has reached the capital of {the_c}. Prices are given in"
    " the {currency}. It helps to know some {language}. On a map, look for {capital} in"
    " {continent}.",
    "name: {c}\ncapital: {capital}\ncontinent: {continent}\nlanguage: {language}\n"
    "currency: {currency}\nadjective: {people}",
    "Q: On which continent is {the_c}?\nA: {continent}\n"
    "Q: What is the capital of {the_c}?\nA: {capital}\n"
    "Q: What is the currency of {the_c}?\nA: The {currency}\n"
    "Q: Name a language spoken in {the_c}.\nA: {language}",
    'The teacher pointed at {the_c} on the wall map. "What is the capital?" she asked. One pupil'
    ' raised a hand and said, "{capital}." "Right," said the teacher. "{capital} is the capital'
    ' of {the_c}, and the {people} currency is the {currency}."',
)

# A heading and a line for each country: lists of ten countries.
QUIZZES = (
    ("Ten countries and their capitals:", "{c} - {capital}"),
    ("Capital cities quiz, with the answers:", "{c}? {capital}"),
    ("Learn these ten capitals.", "The capital of {the_c} is {capital}."),
    ("Whose capital is it?", "{capital}: {c}"),
    ("country,capital", "{c},{capital}"),
    ("Lookup table", "CAPITAL:{c} {capital}"),
    ("Notes for the geography test", "* {capital} is the capital of {the_c}."),
    ("| Country | Capital |", "| {c} | {capital} |"),
)
QUIZ_SIZE = 10


def fields(row: dict) -> dict[str, str]:
    """Return the values that the templates use for one country."""
    name = row["country"]
    article = row.get("the", False)
    values = {key: row[key] for key in ("capital", "continent", "language", "currency", "people")}
    values["c"] = name
    values["the_c"] = f"the {name}" if article else name
    values["The_c"] = f"The {name}" if article else name
    return values


def render(countries: list[dict]) -> str:
    """Return all documents, in a fixed shuffled order, with a separator line between them."""
    rng = random.Random(0)
    rows = [fields(row) for row in countries]
    documents = [template.format(**row) for row in rows for template in DOCUMENTS]
    for heading, line in QUIZZES:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order), QUIZ_SIZE):
            lines = [line.format(**row) for row in order[start : start + QUIZ_SIZE]]
            documents.append("\n".join([heading, *lines]))
    rng.shuffle(documents)
    return f"\n{SEPARATOR}\n".join(documents) + "\n"


def main() -> None:
    """Read countries.yaml beside this script and write the text to the given file."""
    parser = argparse.ArgumentParser(description="Render countries.yaml as training text.")
    parser.add_argument("out", type=Path, help="text file to write")
    args = parser.parse_args()
    table = Path(__file__).with_name("countries.yaml").read_text(encoding="utf-8")
    args.out.write_text(render(yaml.safe_load(table)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
