"""Final answers against a table written by hand, and against SymPy on random expressions."""

import random
import threading

import pytest
import sympy

from eval.harness.answers import MathVerify, boxed_answer, gsm8k_answer, last_number, same_number


@pytest.mark.parametrize(
    "text, expected",
    [
        ("6 x 7 = <<6*7=42>>42\n#### 42", "42"),
        ("#### -3", "-3"),
        ("#### 1,234,567", "1234567"),
        ("#### 12.50", "12.50"),
        ("#### 5\nThe answer is: 6", "5"),
        ("#### 5 apples and 6 pears", "5"),
        ("#### 7\n### Instruction:\n#### 8", "7"),  # the first, as the authors read it
        ("#### 72.", "72."),
        ("#### $5", None),  # none of the authors' form
        ("####5", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_gsm8k_answer(text, expected):
    assert gsm8k_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("it is 42", "42"),
        ("it is -42.", "-42"),
        ("7-3", "3"),
        ("(7)-3", "3"),
        ("7 - 3 = 4, so 4 dogs", "4"),
        ("x = -0.5", "-0.5"),
        ("costs $1,234.50 a year", "1234.50"),
        (r"costs \$5", "5"),
        ("-$5", "-5"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("half is .5", ".5"),
        ("1/2", "2"),
        ("50% off", "50"),
        ("4 apples at 3:45", "45"),
        ("no number", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    "reference, answer, same",
    [
        ("72", "72.00", True),
        ("72", "72.", True),
        ("0.5", ".5", True),
        ("-3", "3", False),
        ("72", "7.2", False),
        ("72", "1.2.3", False),
        ("72", ".", False),
        ("72", None, False),
        ("100000000000000000001", "100000000000000000000", False),  # more digits than a float has
    ],
)
def test_same_number(reference, answer, same):
    assert same_number(reference, answer) is same


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so $\boxed{42}$.", "42"),
        (r"$\boxed{1}$ or $\boxed{2}$", "2"),
        (r"$\boxed{\frac{1}{\sqrt{2}}}$", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a\\b}", r"a\\b"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"$x = \boxed 9$ and more", "9"),
        (r"$\boxed{x \in [1, 2)}$ for all $x$.", r"x \in [1, 2)"),
        (r"\boxed{ 10 \text{ cm} }", r"10 \text{ cm}"),
        (r"\boxed{}", ""),
        (r"\boxed{1}, then \boxed{2", "1"),  # cut short within the second
        (r"\boxed{\frac{1}{2}", None),
        ("42", None),
    ],
)
def test_boxed_answer(text, expected):
    assert boxed_answer(text) == expected


SAME = [
    ("42", "42.0"),
    ("-3", "-3"),
    ("1,234", "1234"),
    (r"\frac{3}{4}", "0.75"),
    (r"\frac34", "3/4"),
    (r"-\frac34", r"\frac{-3}{4}"),
    (r"\tfrac{1}{2}", r"\dfrac12"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"10\text{ cm}", "10"),
    (r"90^\circ", "90"),
    (r"\$5", "5"),
    (r"50\%", "50"),
    (r"(x+1)^2", "x^2 + 2x + 1"),
    (r"\{1, 2\}", r"\{2,1\}"),
    ("[1,2)", r"\left[1, 2\right)"),
    (r"(-\infty, 3) \cup (3, \infty)", r"(-\infty,3)\cup(3,\infty)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2/2 \\ 2 \end{pmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    ("x=5", "5"),
]
DIFFERENT = [
    ("42", "43"),
    ("3", "-3"),
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    ("(1, 2)", "(2, 1)"),
    ("[1,2)", "[1,2]"),
    (r"(x+1)^2", "x^2 + 1"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"\text{Evelyn}", r"\text{Carla}"),
    ("42", ""),
    ("42", None),
]


NEVER = 10**6  # seconds: no comparison here fails because the machine is busy


@pytest.mark.parametrize("reference, answer, same", [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_same_answer(reference, answer, same):
    verifier = MathVerify(NEVER)
    assert verifier.same_answer(reference, answer) is same
    assert verifier.timeouts == 0


@pytest.mark.parametrize(
    "text, agrees",
    [
        ("we get $x = 3$ and so $y = \\frac{1}{2}$.", True),
        ("the answer is 0.5", True),
        ("the answer is 1/2, which is more than 1/3", True),
        ("it is 1/2, which is more than 1/3", False),
        (r"first $\frac12$, then $7$", False),
        ("nothing at all", False),
    ],
)
def test_the_answer_of_a_text_without_a_box(text, agrees):
    assert MathVerify(NEVER).agrees(r"\frac{1}{2}", text) is agrees


def test_same_answer_is_equality_of_sympy():
    """Random rational functions, written in two ways, and two that differ in one coefficient."""
    x, draw = sympy.symbols("x"), random.Random(0)
    verifier = MathVerify(NEVER)
    for _ in range(12):
        a, b, c = (draw.randint(1, 9) for _ in range(3))
        factored, expanded = (a * x + b) * (x - c), a * x**2 + (b - a * c) * x - b * c
        assert sympy.expand(factored - expanded) == 0
        assert verifier.same_answer(sympy.latex(factored), sympy.latex(expanded))
        assert not verifier.same_answer(sympy.latex(factored), sympy.latex(expanded + x))
    assert (verifier.timeouts, verifier.errors) == (0, {})


def test_what_takes_too_long_is_counted():
    verifier = MathVerify(seconds=1)
    assert not verifier.same_answer(r"9^{9^{9^9}}", "3")
    assert verifier.timeouts > 0


def test_what_math_verify_fails_on_is_counted(monkeypatch):
    def fails(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("eval.harness.answers.verify", fails)
    verifier = MathVerify(NEVER)
    assert not verifier.same_answer("1", "2")
    assert set(verifier.errors) == {"ZeroDivisionError"}


def test_other_threads_are_refused():
    raised = []

    def compare():
        try:
            MathVerify().same_answer("1", "2")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert raised and "main thread" in raised[0]
