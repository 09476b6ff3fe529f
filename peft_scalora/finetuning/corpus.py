"""A generated corpus of English grammatical acceptability, for examples that must run without a dataset.

Sentences come in minimal pairs: an acceptable one (label 1) and the same one with a single violation (label 0).
Counting words does not tell them apart. Either both have the same words in another order, or the violation puts one
form for another where each is right in half of the contexts. The cue is often far away: nouns of random number or
gender, phrases and clauses stand between the words that must match.
The splits share function words only, so held-out accuracy measures grammar and not memory of nouns and verbs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Lexicon = dict[str, tuple]  # word class: nouns as (singular, plural), verbs as Verb, the rest as str

# Far below the number of sentences each phenomenon can form, so drawing until a pair is new ends quickly.
MAX_SIZE = 100_000

PREPOSITIONS = ("near", "behind", "beside", "opposite")
DEGREES = ("very", "quite", "rather")
MODALS = ("will", "can", "must", "should")
DETERMINERS = (("this", "every", "each", "another"), ("these", "those", "several", "many"))  # singular, plural
PRONOUNS = (("he", "him"), ("she", "her"), ("they", "them"))  # as subject, as object


class Verb(NamedTuple):
    """Forms of a verb ("she sees, they see, she saw, has seen, is seeing"); [0] is the singular, [1] the plural."""

    third: str
    base: str
    past: str
    participle: str
    ing: str


def _with_s(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _noun(singular: str) -> tuple[str, str]:
    return singular, _with_s(singular)


def _verb(entry: str) -> Verb:
    """Inflect "base" or "base:past:participle"; no verb listed doubles its last letter or changes y to i."""
    base, *irregular = entry.split(":")
    stem = base.removesuffix("e")
    past, participle = irregular or (stem + "ed", stem + "ed")
    return Verb(_with_s(base), base, past, participle, stem + "ing")


def _lexicon(**classes: str) -> Lexicon:
    inflect = dict.fromkeys(("people", "feminine", "masculine", "thing"), _noun)
    inflect |= dict.fromkeys(("social", "manual", "alone", "think", "know"), _verb)
    return {kind: tuple(map(inflect.get(kind, str), words.split())) for kind, words in classes.items()}


# The labels rest on these properties: `people` are of either gender; `social` verbs need a person and `manual` verbs a
# thing as object, and neither takes two ("what did she buy the lamp?"); `alone` verbs refuse an object; `think` verbs
# take "that" but license neither "ever" nor a subjunctive; `know` verbs also take "who" and "what".
LEXICONS = {
    "train": _lexicon(
        people="doctor lawyer pilot clerk farmer teacher painter driver senator banker singer tourist student barber "
        "poet judge sailor plumber neighbor reporter artist baker",
        feminine="actress queen nun grandmother girl sister",
        masculine="king monk grandfather boy uncle brother",
        thing="lamp table bottle letter camera ladder basket piano carpet statue hammer blanket wagon mirror bicycle "
        "kettle trumpet curtain helmet pillow suitcase cabinet",
        social="praise blame encourage betray portray amuse ridicule outsmart overwhelm describe discourage embarrass "
        "reward insult torment misquote",
        manual="repair damage inspect destroy locate conceal acquire dismantle replace misplace discard confiscate "
        "examine obtain demolish vandalize",
        alone="loiter sneeze smile faint yawn hesitate laugh shiver arrive cough stumble tremble sigh snore giggle "
        "frown struggle sleep:slept:slept kneel:knelt:knelt weep:wept:wept",
        think="think:thought:thought claim believe",
        know="know:knew:known remember learn",
        women="Mary Susan Linda Karen Emma Alice Helen Laura Diana Rachel Sophie Nancy",
        men="John Robert David Peter Thomas Kevin Brian Edward George Henry Simon Jacob",
        adjective="tall old strange famous dirty lovely heavy clean pale ugly cold quiet valuable wet dusty odd plain "
        "elegant charming slender",
        adverb="often secretly quietly usually openly proudly",
    ),
    "held_out": _lexicon(
        people="nurse engineer chef dancer tailor soldier editor florist butcher librarian surgeon mayor writer "
        "gardener cyclist dentist athlete professor detective miner visitor merchant",
        feminine="princess waitress aunt duchess bride daughter",
        masculine="prince waiter nephew duke groom son",
        thing="clock chair vase fence sofa drum violin bucket candle ring tent cupboard teapot necklace parcel jacket "
        "rug scooter umbrella bench barrel lantern",
        social="arrest honor humiliate accuse dismiss congratulate rescue comfort overrate thank introduce endanger "
        "injure disgrace pamper overthrow:overthrew:overthrown",
        manual="withhold:withheld:withheld restore wreck salvage remove retrieve ruin scrutinize abandon overlook "
        "ransack reject misuse transport detach enhance",
        alone="doze snicker fidget limp chuckle linger gasp groan blush wince rejoice languish cringe shudder "
        "meditate emerge apologize perish dawdle whimper",
        think="say:said:said suspect assume",
        know="discover notice reveal",
        women="Julia Sarah Anna Emily Martha Irene Carol Monica Teresa Clara Judith Ruth",
        men="James Daniel Paul Steven Victor Oscar Martin Walter Samuel Hugo Philip Arthur",
        adjective="short beautiful dull gloomy large greasy graceful weird fancy delicate muddy remarkable tiny thin "
        "warm bright mysterious fragile noisy popular",
        adverb="always frequently privately publicly repeatedly calmly",
    ),
}

# "[a|b]" is a in the acceptable sentence and b in the other. Where a violation replaces one form by another, as many
# templates want the first as the second, so neither is a hint. `_slots` says what stands in the braces.
TEMPLATES = {
    "agreement_attractor": (
        "the {n} {place1} [{predicate}|{predicate_wrong}]",
        "the {n} {place1} {place2} [{predicate}|{predicate_wrong}]",
        "the {n} {near} the {m} [{predicate}|{predicate_wrong}]",
    ),
    "agreement_relative": (
        "the {n} that the {m} {m_sees} [{predicate}|{predicate_wrong}]",
        "the {n} that the {m} [{m_sees}|{m_sees_wrong}] {predicate}",
        "the {n} that {sees} the {m} [{predicate}|{predicate_wrong}]",
        "the {n} that [{sees}|{sees_wrong}] the {m} {predicate}",
    ),
    "reflexive": (
        "{binder} {near} {rival} {social1.past} [{binder_self}|{rival_self}]",
        "{binder} that {rival} {social2.past} {social1.past} [{binder_self}|{rival_self}]",
        "{binder} that {social2.past} {rival} {social1.past} [{binder_self}|{rival_self}]",
        "{rival} {think1.past} that {binder} {social1.past} [{binder_self}|{rival_self}]",
    ),
    "determiner_noun": (
        "[{this}|{this_wrong}] {n} {verb.past} {object}",
        "{person} {social1.past} [{this}|{this_wrong}] {quality} {n}",
        "{person} {manual1.past} [{this}|{this_wrong}] {quality} {n_thing}",
    ),
    "word_order": (
        "the [{adjective1} {n}|{n} {adjective1}] {verb.past} {object}",
        "the [{degree} {adjective1}|{adjective1} {degree}] {n} {verb.past} {object}",
        "the {n} [{adverb1} {verb.past}|{verb.past} {adverb1}] {object}",
        "the [{n} {adverb1}|{adverb1} {n}] {verb.past} {object}",
        "the {n} [{near} {thing}|{thing} {near}] {verb.past} {object}",
    ),
    "verb_form": (
        "the {n} {auxiliary} [{form}|{form_wrong}] {object}",
        "the {n} {place1} {auxiliary} {adverb1} [{form}|{form_wrong}] {object}",
        "{auxiliary} the {n} [{form}|{form_wrong}] {object}?",
        "{auxiliary} the {n} {place1} [{form}|{form_wrong}] {object}?",
    ),
    "negative_polarity": (
        "[no {n} that the|the {n} that no] {m} {social1.past} {polar}",
        "[no {n} that {social1.past} the|the {n} that {social1.past} no] {m} {polar}",
        "[the {n} {alone1.past}, but no|no {n} {alone1.past}, but the] {m} {polar}",
        "[no {n} {social1.past} any|any {n} {social1.past} no] {m}",
    ),
    "filler_gap": (
        "{name1} {know1.past} [{what}|that] {person} {verb.past}",
        "{name1} {know1.past} [that|{what}] {person} {verb.past} {object}",
        "{name1} {know1.past} [{what}|that] {person} {think1.past} that the {n} {place1} {verb.past}",
        "{name1} {know1.past} [that|{what}] {person} {think1.past} that the {n} {place1} {verb.past} {object}",
        "[{what} did|did] {person} {verb.base}?",
        "[did|{what} did] {person} {verb.base} {object}?",
        "[{what} did|did] {person} {think1.base} that the {n} {verb.past}?",
        "[did|{what} did] {person} {think1.base} that the {n} {verb.past} {object}?",
    ),
    "island": (
        "who did the {n} [and {name1} {social1.base}|{social1.base} {name1} and]?",
        "{person} {know1.past} who the {n} [and {name1} {social1.past}|{social1.past} {name1} and]",
        "what did {person} {manual1.base} [{clause} {thing}|{thing} {clause}]?",
        "{name1} {know1.past} what {person} {manual1.past} [{clause} {thing}|{thing} {clause}]",
        "what did the {n} that {manual2.past} [{thing} {manual1.base}|{manual1.base} {thing}]?",
        "{name1} {know1.past} what the {n} that {manual2.past} [{thing} {manual1.past}|{manual1.past} {thing}]",
    ),
    "argument_structure": (
        "{person} [{alone1.past}|{verb.past}]",
        "the {n} {place1} [{alone1.past}|{social1.past}]",
        "the {n} that [{alone1.past}|{manual1.past}] {was} {adjective1}",
        "{person} [{verb.past}|{alone1.past}] {object}",
        "the {n} that {person} [{social1.past}|{alone1.past}] {was} {adjective1}",
        "the {n_thing} that {person} [{manual1.past}|{alone1.past}] {was} {adjective1}",
    ),
    "pronoun_case": (
        "[{he}|{him}] {verb.past} {object}",
        "the {n} that [{he}|{him}] {social1.past} {alone1.past}",
        "{person} {think1.past} that [{he}|{him}] {verb.past} {object}",
        "{person} {social1.past} [{him}|{he}]",
        "the {n} that {social1.past} [{him}|{he}] {alone1.past}",
        "the {n} {near} [{him}|{he}] {alone1.past}",
    ),
    "auxiliary_fronting": (
        "[{is} the {n} that {has} {alone1.participle}|{has} the {n} that {alone1.participle} {is}] {adjective1}?",
        "[{has} the {n} that {is} {adjective1}|{is} the {n} that {adjective1} {has}] {alone1.participle}?",
        "[{modal1} the {n} that {modal2} {alone1.base}|{modal2} the {n} that {alone1.base} {modal1}] {alone2.base}?",
    ),
}
PHENOMENA = tuple(TEMPLATES)
# Half of the pairs stand in a longer sentence, `~` being the template; in a question's, only the first of these.
CARRIERS = ("after {aside}, ~", "{name2} {think2.third} that ~", "~, and {aside}")


def _pick(rng: Random, options: Sequence[T]) -> T:
    # Python promises the same stream across versions for random() alone, not for choice(), sample() or shuffle().
    return options[int(rng.random() * len(options))]


def _shuffled(rng: Random, options: Sequence[T]) -> list[T]:
    return sorted(options, key=lambda _: rng.random())


def _agreement(rng: Random, forms: dict[str, tuple]) -> dict[str, str]:
    """Choose singular or plural for all forms; return the chosen ones by name, the others under "NAME_wrong"."""
    number = _pick(rng, (0, 1))
    right = {name: pair[number] for name, pair in forms.items()}
    return right | {f"{name}_wrong": pair[1 - number] for name, pair in forms.items()}


def _slots(rng: Random, lex: Lexicon) -> dict[str, Any]:
    """Draw words for every slot of the templates; no noun, name or verb is in two slots that occur together.

    social1, social2, ... are distinct verbs of a class. {n} is a noun with which {is}, {this}, {predicate}, ... agree.
    """
    pools = {kind: _shuffled(rng, words) for kind, words in lex.items()}
    pools |= {"name": _shuffled(rng, pools["women"][1:] + pools["men"][1:]), "modal": _shuffled(rng, MODALS)}
    slots = {f"{kind}{i + 1}": words[i] for kind, words in pools.items() for i in range(3)}
    names, nouns, things = pools["name"][3:], pools["people"][3:], pools["thing"][1:]

    def phrase(pool: list[tuple[str, str]]) -> str:
        adjective = _pick(rng, lex["adjective"]) + " " if rng.random() < 0.25 else ""
        return f"the {adjective}{_pick(rng, pool.pop())}"

    person, other = (_pick(rng, (names.pop(), phrase(nouns))) for _ in range(2))
    place1, place2 = (f"{_pick(rng, PREPOSITIONS)} {phrase(things)}" for _ in range(2))
    social, manual, alone, adjective = (slots[f"{kind}1"] for kind in ("social", "manual", "alone", "adjective"))
    verb, patient, what = _pick(rng, ((social, other, "who"), (manual, phrase(things), "what")))
    slots |= {"person": person, "place1": place1, "place2": place2, "verb": verb, "object": patient, "what": what}
    slots |= {"near": _pick(rng, PREPOSITIONS), "degree": _pick(rng, DEGREES), "thing": phrase(things)}
    slots["he"], slots["him"] = _pick(rng, PRONOUNS)
    slots["aside"] = f"{phrase(nouns)} {slots['alone3'].past}"
    slots["clause"] = f"{_pick(rng, ('before', 'after', 'while'))} {names.pop()} {slots['manual2'].past}"
    slots["polar"] = _pick(rng, (f"ever {slots['alone2'].past}", f"{manual.past} any {_pick(rng, things.pop())}"))
    slots["quality"] = _pick(rng, ("", f"{slots['adjective2']} and ", f"{slots['degree']} ")) + adjective

    predicates = (
        tuple(f"{form} {adjective}" for form in _pick(rng, (("is", "are"), ("was", "were")))),
        tuple(f"{form} {verb.participle} {patient}" for form in ("has", "have")),
        tuple(f"{form} {patient}" for form in verb[:2]),
        alone[:2],
    )
    forms = {"is": ("is", "are"), "was": ("was", "were"), "has": ("has", "have"), "sees": slots["social2"]}
    forms |= {"n": slots["people1"], "n_thing": slots["thing1"], "predicate": _pick(rng, predicates)}
    forms |= {"this": tuple(_pick(rng, words) for words in DETERMINERS)}
    slots |= _agreement(rng, forms)
    slots |= _agreement(rng, {"m": slots["people2"], "m_sees": slots["social2"]})

    auxiliaries = ((slots["has"], verb.participle), (slots["modal1"], verb.base), (slots["is"], verb.ing))
    (slots["auxiliary"], slots["form"]), (_, slots["form_wrong"]) = _shuffled(rng, auxiliaries)[:2]
    she, he, they = f"the {slots['feminine1'][0]}", f"the {slots['masculine1'][0]}", f"the {slots['people3'][1]}"
    referents = (
        ("herself", she, (she, slots["women1"])),
        ("himself", he, (he, slots["men1"])),
        ("themselves", they, (they,)),
    )
    (slots["binder_self"], slots["binder"], _), (slots["rival_self"], _, rivals) = _shuffled(rng, referents)[:2]
    slots["rival"] = _pick(rng, rivals)
    return slots


def _pair(rng: Random, lex: Lexicon, phenomenon: str) -> tuple[str, str]:
    """Return an acceptable sentence and its unacceptable twin."""
    template = _pick(rng, TEMPLATES[phenomenon])
    question = template.endswith("?")
    carrier = _pick(rng, CARRIERS[:1] if question else CARRIERS) if _pick(rng, (True, False)) else "~"
    slots = _slots(rng, lex)
    whole = carrier.replace("~", template) + ("" if question else ".")
    good, bad = (re.sub(r"\[(.*?)\|(.*?)\]", side, whole).format_map(slots) for side in (r"\1", r"\2"))
    return good[0].upper() + good[1:], bad[0].upper() + bad[1:]


def generate(split: str, size: int, seed: int = 0, phenomena: Sequence[str] = PHENOMENA) -> list[dict[str, str | int]]:
    """Generate `size` different rows {"sentence", "label", "phenomenon"} of a split, "train" or "held_out".

    Labels are balanced, and so are the `phenomena` as far as whole pairs allow. Equal arguments give equal rows on
    every machine; another seed gives other sentences from the same words.
    """
    if split not in LEXICONS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(LEXICONS)}.")
    if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size!r} is not possible; choose an integer from 1 to {MAX_SIZE}.")
    unknown = set(phenomena) - set(PHENOMENA)
    if unknown or not phenomena:
        raise ValueError(f"phenomena={phenomena!r} must be some of {', '.join(PHENOMENA)}.")
    rng = Random(f"{split} {seed}")
    rows: list[dict[str, str | int]] = []
    seen: set[str] = set()
    while len(rows) < size:
        phenomenon = phenomena[len(rows) // 2 % len(phenomena)]
        pair = _pair(rng, LEXICONS[split], phenomenon)
        if seen.isdisjoint(pair):
            seen.update(pair)
            rows += [{"sentence": text, "label": 1 - i, "phenomenon": phenomenon} for i, text in enumerate(pair)]
    return _shuffled(rng, rows[:size])
