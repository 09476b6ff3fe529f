"""The corpus of finetuning/corpus.py: reproducible, balanced, held_out in new words, no help from word counts."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from peft_scalora.finetuning.corpus import LEXICONS, MAX_SIZE, PHENOMENA, TEMPLATES, generate

SPLITS = ("train", "held_out")
# All that the splits may share, listed by hand.
FUNCTION_WORDS = set(
    "the no any ever this every each another these those several many very quite rather and but that who what did "
    "is are was were has have will can must should near behind beside opposite before after while "
    "he him she her they them herself himself themselves".split()
)


def words_of(sentence):
    return re.findall(r"\w+", sentence.lower())


def lexicon_words(split):
    """Every form of every content word of a split."""
    entries = [entry for kind in LEXICONS[split].values() for entry in kind]
    return {form.lower() for entry in entries for form in ([entry] if isinstance(entry, str) else entry)}


def side_words(template, side):
    """The words and slots of a template on one side, "good" or "bad"; a slot and its wrong twin count as one."""
    text = re.sub(r"\[(.*?)\|(.*?)\]", {"good": r"\1", "bad": r"\2"}[side], template)
    # Which of the two is right is a coin toss in `_slots`.
    text = text.replace("_wrong", "").replace("rival_self", "binder_self")
    return re.findall(r"[\w{}.]+", text)


@pytest.mark.parametrize("split", SPLITS)
def test_equal_arguments_give_equal_rows(split):
    assert generate(split, 240, seed=3) == generate(split, 240, seed=3)
    assert generate(split, 240, seed=3) != generate(split, 240, seed=4)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_rows_do_not_depend_on_the_process(hash_seed):
    program = (
        "import json; from peft_scalora.finetuning import corpus; print(json.dumps(corpus.generate('train', 100)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == generate("train", 100)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 25, 999, 2400])
def test_labels_and_phenomena_are_balanced(split, size):
    rows = generate(split, size)
    assert len(rows) == size
    labels = Counter(row["label"] for row in rows)
    assert abs(labels[1] - labels[0]) == size % 2
    phenomena = Counter(row["phenomenon"] for row in rows)
    counts = [phenomena[name] for name in PHENOMENA]
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 2  # pairs are kept together


@pytest.mark.parametrize("split", SPLITS)
def test_no_sentence_comes_twice(split):
    sentences = [row["sentence"] for row in generate(split, 5000)]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_look_like_sentences(split):
    for row in generate(split, 2000):
        assert re.fullmatch(r"[A-Z][A-Za-z]*(,? [A-Za-z]+)+[.?]", row["sentence"])


@pytest.mark.parametrize("split", SPLITS)
def test_no_noun_name_or_verb_comes_twice_in_a_sentence(split):
    """Repetition, as in "Mary said that Mary left" or "the clerk near the clerk", would blur the labels."""
    others = FUNCTION_WORDS | set(LEXICONS[split]["adjective"])
    for row in generate(split, 2000):
        counts = Counter(word for word in words_of(row["sentence"]) if word not in others)
        assert max(counts.values()) == 1


def test_splits_share_no_content_word():
    assert lexicon_words("train").isdisjoint(lexicon_words("held_out"))
    train, held_out = (
        {word for row in generate(split, 5000) for word in words_of(row["sentence"])} for split in SPLITS
    )
    assert train & held_out <= FUNCTION_WORDS
    assert train <= lexicon_words("train") | FUNCTION_WORDS
    assert held_out <= lexicon_words("held_out") | FUNCTION_WORDS


@pytest.mark.parametrize("split", SPLITS)
def test_lexicon_is_large_and_inflected(split):
    lexicon = LEXICONS[split]
    nouns = [noun for kind in ("people", "feminine", "masculine", "thing") for noun in lexicon[kind]]
    verbs = [verb for kind in ("social", "manual", "alone", "think", "know") for verb in lexicon[kind]]
    assert len(nouns) >= 40
    assert len(lexicon["social"] + lexicon["manual"]) >= 30
    assert len(lexicon["alone"]) >= 20
    assert len(lexicon["adjective"]) >= 20
    assert len(lexicon["women"] + lexicon["men"]) >= 24
    bases = [verb.base for verb in verbs]
    assert len(set(nouns)) == len(nouns) and len(set(bases)) == len(bases)
    # The two spelling rules that the inflection leaves out: y to i, and a consonant doubled after one stressed vowel.
    assert not [word for word in bases + [noun[0] for noun in nouns] if re.search(r"[^aeiou]y$", word)]
    assert not [base for base in bases if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", base)]


def test_inflection():
    verbs = {verb.base: verb for lexicon in LEXICONS.values() for verb in lexicon["social"] + lexicon["manual"]}
    assert verbs["praise"] == ("praises", "praise", "praised", "praised", "praising")
    assert verbs["demolish"] == ("demolishes", "demolish", "demolished", "demolished", "demolishing")
    assert verbs["betray"] == ("betrays", "betray", "betrayed", "betrayed", "betraying")
    assert verbs["overthrow"] == ("overthrows", "overthrow", "overthrew", "overthrown", "overthrowing")


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_every_word_is_right_as_often_as_wrong(phenomenon):
    good, bad = (
        Counter(word for template in TEMPLATES[phenomenon] for word in side_words(template, side))
        for side in ("good", "bad")
    )
    assert good == bad


@pytest.mark.parametrize("split", SPLITS)
def test_both_labels_have_the_same_length(split):
    rows = generate(split, 6000)
    mean = {
        label: sum(len(words_of(row["sentence"])) for row in rows if row["label"] == label) / 3000 for label in (0, 1)
    }
    assert mean[0] == pytest.approx(mean[1], rel=0.01)


def test_counting_words_does_not_help():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = generate("train", 4800, seed=0), generate("train", 2400, seed=1)
    vectorizer = text.CountVectorizer(token_pattern=r"\w+")
    features = vectorizer.fit_transform(row["sentence"] for row in train)
    model = linear_model.LogisticRegression(max_iter=2000).fit(features, [row["label"] for row in train])
    accuracy = model.score(vectorizer.transform(row["sentence"] for row in test), [row["label"] for row in test])
    assert accuracy < 0.62


@pytest.mark.parametrize("split", ["test", "", None])
def test_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match=rf"split={split!r} is unknown; choose one of train, held_out"):
        generate(split, 10)


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1, 10.0, "10"])
def test_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"size={size!r} is not possible; choose an integer from 1 to {MAX_SIZE}"):
        generate("train", size)


def test_phenomena_can_be_chosen():
    chosen = ("reflexive", "island")
    rows = generate("train", 200, phenomena=chosen)
    assert Counter(row["phenomenon"] for row in rows) == dict.fromkeys(chosen, 100)


def test_the_phenomenon_with_the_shortest_sentences_fills_the_largest_corpus():
    assert len(generate("held_out", MAX_SIZE, phenomena=("argument_structure",))) == MAX_SIZE


@pytest.mark.parametrize("phenomena", [("spelling",), ("island", "spelling"), ()])
def test_unknown_phenomenon_is_refused(phenomena):
    with pytest.raises(ValueError, match=rf"phenomena={re.escape(repr(phenomena))} must be some of agreement_"):
        generate("train", 10, phenomena=phenomena)
