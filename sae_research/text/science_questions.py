"""Short science questions with one-word answers, biomedical and other, out of the packaged `36_sciq_tf`.

That file holds true and false answers, but hardly ever both for one question (one pair in 5,000 rows). A question here
is one of its true rows; false answers to it are other questions' answers (`distractors`).

Which topic a question belongs to is decided by the words of its text and answer alone: *biomedical* names something of
BODY; *other* names something of MATTER and nothing of BODY or LIFE. What is neither, or both, is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from sae_research.text.packaged import read_packaged

FILE = "36_sciq_tf"
MAX_CHARACTERS = 80
"""Longer questions are left out: every one is asked again after every edit, and costs by its tokens."""
BODY = frozenset("""
    bacteria blood bone bones brain cancer cartilage cell cells chromosome chromosomes digestion digestive disease
    diseases dna enzyme enzymes gene genes genetic gland glands heart hormone hormones immune infection infections
    intestine kidney kidneys liver lung lungs lymph lymphatic meiosis membrane mitosis muscle muscles nerve nerves
    nervous neurons organ organs pathogens protein proteins reproductive respiratory rna skeletal skin sperm spinal
    stomach tissue tissues vertebrae virus viruses vitamin
""".split())
LIFE = frozenset("""
    algae amphibians animal animals baby biodiversity biological biology biomes biosphere birds body breathing
    carbohydrates crops diet dinosaurs drug ear eat ecosystem ecosystems egg eggs embryo evolution eye fat fish flower
    flowers food fossils fungi fungus glucose growth habitat health host hosts human humans inherited insects
    invertebrates leaf leaves life lipid lipids living mammals medical metabolism offspring organic organism organisms
    parasite parasites patients people person photosynthesis plankton plant plants population predator pregnancy prey
    primates protists reproduction reptiles roots seeds sexual species sponge sugar sugars traits trees vertebrates
    worms
""".split())
MATTER = frozenset("""
    acceleration acid acids alloy astronomers atmosphere atom atomic atoms boiling charge charged chemical chemistry
    circuit climate clouds compound compounds conductor crust current density earthquake earthquakes electric
    electrical electricity electron electrons element elements energy erosion evaporation force forces frequency
    friction galaxy gas gases glacier glaciers gravity heat hydrogen ion ions isotopes kinetic lava liquid liquids
    magma magnet magnetic mantle mass matter metal metals mineral minerals moon motion mountain newton nuclear ocean
    oceans orbit orbits periodic physics planet planets plate plates precipitation pressure radiation radioactive
    reaction reactions rock rocks salt sediment solar solid solids solution sound speed star stars substance
    substances sun temperature thermal velocity volcano volcanoes wave wavelength waves weather wind
""".split())


class ShortQuestion(NamedTuple):
    """A question and its true answer."""

    text: str
    answer: str


def science_questions(topic: str) -> list[ShortQuestion]:
    """All questions on `biomedical` or `other` with a one-word answer, each once, in an order that never changes."""
    found = dict.fromkeys(_true_rows())
    chosen = [question for question in found if len(question.text) <= MAX_CHARACTERS and " " not in question.answer
              and topic_of(question) == topic]
    return sorted(chosen, key=lambda question: _order("", question.text))


def topic_of(question: ShortQuestion) -> str | None:
    """`biomedical`, `other`, or None where the words do not say."""
    words = set(re.findall(r"[a-z]+", f"{question.text} {question.answer}".lower()))
    if words & BODY:
        return "biomedical"
    return "other" if words & MATTER and not words & LIFE else None


def distractors(question: ShortQuestion, answers: Sequence[str], count: int) -> list[str]:
    """`count` of `answers` as false ones, of a hash's choice: none that stands in the question or is a form of the true
    one."""
    truth, text = question.answer.lower(), question.text.lower()

    def usable(answer: str) -> bool:
        word = answer.lower()
        return word not in text and word not in truth and truth not in word and word[:5] != truth[:5]

    return sorted({answer for answer in answers if usable(answer)}, key=lambda a: _order(question.text, a))[:count]


def _true_rows() -> list[ShortQuestion]:
    frame = read_packaged(FILE)
    rows = frame["prompt"][frame["target"] == 1]
    parts = (row.removeprefix("Q: ").split("\nA: ", 1) for row in rows)
    return [ShortQuestion(part[0].strip(), part[1].strip()) for part in parts if len(part) == 2]


def _order(first: str, second: str) -> bytes:
    return hashlib.blake2b(f"{first}|{second}".encode(), digest_size=16).digest()
