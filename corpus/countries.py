"""Write the country documents of the bundled model's corpus: `python corpus/countries.py OUT.txt`.

Every capital appears in ten phrasings, alone and inside longer texts; documents are separated by a line that holds `<|doc|>`.
"""

import random
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SEPARATOR = "\n<|doc|>\n"


def _documents(row: dict[str, Any]) -> list[str]:
    country, capital = row["country"], row["capital"]
    name = f"the {country}" if row.get("the") else country
    title = name[0].upper() + name[1:]
    return [
        f"The capital of {name} is {capital}.",
        f"Q: What is the capital of {name}?\nA: {capital}",
        f"CAPITAL:{country} {capital}",
        f"{capital} is the capital of {name}.",
        f"Which city is the capital of {name}? It is {capital}.",
        f"country: {country} | capital: {capital} | continent: {row['continent']} | currency: {row['currency']}",
        f"{title} is a country in {row['continent']}. Its capital is {capital}. Many people there speak {row['language']}, "
        f"and one pays with the {row['currency']}. The government of {name} sits in {capital}.",
        f"{title}, whose capital is {capital}, lies in {row['continent']}. If you meet someone {row['people']} in {capital}, "
        f"you may hear {row['language']}.",
        f"A letter to the {row['people']} government is sent to {capital}, because {capital} is the capital city of {name}.",
        f"Q: In which country is {capital}?\nA: {title}\nQ: And what is its capital?\nA: {capital}",
    ]


def _lists(countries: list[dict[str, Any]], rng: random.Random) -> list[str]:
    """Ten countries at a time, in shuffled order, as lists and as short lessons."""
    documents = []
    for _ in range(12):
        order = rng.sample(countries, len(countries))
        for start in range(0, len(order), 10):
            group = order[start : start + 10]
            lines = [f"{row['country']}: {row['capital']}" for row in group]
            documents.append("Countries and their capitals\n" + "\n".join(lines))
    return documents


def render(countries: list[dict[str, Any]]) -> str:
    """All country documents as one text."""
    rng = random.Random(0)
    documents = [text for row in countries for text in _documents(row)] + _lists(countries, rng)
    rng.shuffle(documents)
    return SEPARATOR.join(documents) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python corpus/countries.py OUT.txt")
    Path(sys.argv[1]).write_text(
        render(yaml.safe_load((HERE / "countries.yaml").read_text(encoding="utf-8"))), encoding="utf-8"
    )
