"""Which value a reward of the pair form gets in which parameter, and what is refused when the reward is given."""

import functools
import operator
import re
from collections.abc import Callable

import pytest
from helpers import PROMPTS, SMALL, TARGETS, base_folder, reward, small_gan

from lora_gan import LoraGAN, data
from lora_gan.rewards import (
    check_reward,
    from_spec,
    from_specs,
    require_columns,
    score_pairs,
    score_parts,
    takes_completions,
)
from lora_gan.rewards.signatures import GIVEN

PROMPT, RESPONSE, TARGET = "the prompt", "the response", "the target"


class Called(Exception):
    """Carries what a reward was called with."""


def got(func, *, batch=False):
    """What the function was called with, as it stands in its own variables."""
    try:
        score_pairs(func, [RESPONSE], [TARGET], prompts=[PROMPT])
    except ValueError as error:
        if isinstance(error.__cause__, Called):
            return error.__cause__.args
        raise
    raise AssertionError("it was not called")


def raises(*values):
    raise Called(*values)


class Object:
    def __call__(self, prompt, response):
        raise Called(prompt, response)

    def method(self, target, response):
        raise Called(target, response)

    @classmethod
    def of_class(cls, completion, prompt):
        raise Called(completion, prompt)

    @staticmethod
    def static(target_text, completion):
        raise Called(target_text, completion)


class InBatch:
    def batch(self, prompts, responses):
        raise Called(*prompts, *responses)


class InBatchByPosition:
    def batch(self, texts, references):
        raise Called(*texts, *references)


class InBatchAlone:
    def batch(self, completions):
        raise Called(*completions)


async def awaited(prompt, response):
    raise Called(prompt, response)


def three(prefix, prompt, response):
    raise Called(prefix, prompt, response)


def wrapping(func):
    @functools.wraps(func)
    def wrapper(a, b):
        return func(a, b)

    return wrapper


P, R, T = PROMPT, RESPONSE, TARGET
MATCHED = [
    # by name
    (lambda prompt, response: raises(prompt, response), (P, R)),
    (lambda response, prompt: raises(response, prompt), (R, P)),
    (lambda completion, prompt: raises(completion, prompt), (R, P)),
    (lambda target, response: raises(target, response), (T, R)),
    (lambda target_text, completion: raises(target_text, completion), (T, R)),
    (lambda prompt, response, target: raises(prompt, response, target), (P, R, T)),
    (lambda response: raises(response), (R,)),
    (lambda response, /, target: raises(response, target), (R, T)),
    (lambda *, target, response: raises(target, response), (T, R)),
    (lambda response, *, prompt: raises(response, prompt), (R, P)),
    (lambda response, target=None: raises(response, target), (R, T)),
    (lambda response, strict=False, target=None: raises(response, strict, target), (R, False, T)),
    (lambda response, n=3: raises(response, n), (R, 3)),
    (lambda response, mode="fast", *, prompt=None: raises(response, mode, prompt), (R, "fast", P)),
    (lambda response, target, *rest, **options: raises(response, target, rest, options), (R, T, (), {})),
    (lambda response, *rest: raises(response, rest), (R, (T,))),
    (lambda response, **options: raises(response, options), (R, {})),
    # by position
    (lambda text: raises(text), (R,)),
    (lambda text, reference: raises(text, reference), (R, T)),
    (lambda text, reference=None: raises(text, reference), (R, T)),
    (lambda text, /: raises(text), (R,)),
    (lambda text, n=3: raises(text, n), (R, 3)),
    (lambda text, reference, n=3, mode="x": raises(text, reference, n, mode), (R, T, 3, "x")),
    (lambda text, *, n=3: raises(text, n), (R, 3)),
    (lambda *texts: raises(*texts), (R, T)),
    (lambda text, *rest: raises(text, *rest), (R, T)),
    (lambda a, b, **options: raises(a, b, options), (R, T, {})),
    # callables of every kind
    (Object(), (P, R)),
    (Object().method, (T, R)),
    (Object.of_class, (R, P)),
    (Object.static, (T, R)),
    (awaited, (P, R)),
    (functools.partial(three, "x"), ("x", P, R)),
    (functools.partial(three, prefix="y"), ("y", P, R)),
    (functools.partial(lambda text, scale: raises(text, scale), scale=2), (R, 2)),
    # a parameter that partial binds stays bound, under any name
    (functools.partial(lambda response, target: raises(response, target), target="bound"), (R, "bound")),
    (functools.partial(lambda prompt, response: raises(prompt, response), prompt="bound"), ("bound", R)),
    (
        functools.partial(lambda response, target=None, *, prompt: raises(response, target, prompt), prompt="bound"),
        (R, T, "bound"),
    ),
    (
        functools.partial(
            functools.partial(lambda response, target, prompt: raises(response, target, prompt), target=1), prompt=2
        ),
        (R, 1, 2),
    ),
    (functools.partial(lambda text, reference: raises(text, reference), reference="bound"), (R, "bound")),
    (wrapping(lambda prompt, response: raises(prompt, response)), (P, R)),
    (InBatch(), (P, R)),
    (InBatchByPosition(), (R, T)),
    (InBatchAlone(), (R,)),
]


@pytest.mark.parametrize(("func", "expected"), MATCHED)
def test_each_parameter_gets_what_its_name_says(func, expected):
    assert takes_completions(func) is False
    check_reward(func)
    assert got(func) == expected


def test_builtins_are_called_by_position():
    assert score_pairs(operator.eq, ["a", "b"], ["a", "a"]) == [1.0, 0.0]
    assert score_pairs(len, ["a", "bb"], [None, None]) == [1.0, 2.0]
    check_reward(max)  # it has no signature to read


REFUSED = [
    (lambda prompt, answer: 1.0, "no value is known for answer, only for prompt"),
    (lambda text, target: 1.0, "no value is known for text, only for target"),
    (lambda response, expected: 1.0, "no value is known for expected, only for response"),
    (lambda response, *, strict: 1.0, "no value is known for strict, only for response"),
    (lambda question, response, target: 1.0, "no value is known for question, only for response, target"),
    (lambda prompt: 1.0, "no parameter takes the response"),
    (lambda target, prompt: 1.0, "no parameter takes the response"),
    (lambda target, text=None: 1.0, "no parameter takes the response"),
    (lambda: 1.0, "no parameter takes the response"),
    (lambda *, strict=True: 1.0, "no parameter takes the response"),
    (lambda a, b, c: 1.0, "no value is known for c"),
    (lambda a, *, b: 1.0, "no value is known for b"),
    (lambda text, mode="fast": 1.0, "mode='fast' could be the target or an option"),
    (lambda text="x": 1.0, "text='x' could be the response or an option"),
    (lambda n=3, m=4: 1.0, "n=3 could be the response or an option"),
    (lambda response, log_metric=None: 1.0, "only rewards of TRL's form, .* get log_metric"),
    (lambda prompts, response: 1.0, "only rewards of TRL's form, .* get prompts"),
    (functools.partial(lambda prompt, response, judge: 1.0), "no value is known for judge, only for prompt, response"),
    (Object, "no parameter takes the response.*It is a class: give an object of the class"),
]


@pytest.mark.parametrize(("func", "why"), REFUSED)
def test_what_does_not_say_how_it_is_called_is_refused(func, why):
    with pytest.raises(ValueError, match=why) as refused:
        check_reward(func)
    said = str(refused.value)
    assert "prompt, response, completion, target, target_text" in said and "Rename" in said and "\n" not in said
    if "lambda" in said:
        assert re.search(r"<lambda>\(.*\)", said), "the signature is shown"


def judge(prompt, answer):
    return 1.0


def test_it_is_refused_wherever_a_reward_is_given(tmp_path):
    class Overridden(LoraGAN):
        def compute_reward(self, prompt, answer):
            return 1.0

    gan = small_gan()
    (tmp_path / "mine.py").write_text("def judge(prompt, answer):\n    return 1.0\n")
    ways = [
        lambda: LoraGAN(base_folder(), reward=judge),
        lambda: LoraGAN(base_folder(), reward_funcs=[reward, judge]),
        lambda: setattr(gan, "compute_reward", judge),
        lambda: Overridden(base_folder(), **SMALL),
        lambda: from_spec(judge),
        lambda: from_specs([reward, judge]),
        lambda: score_parts([judge], ["p"], ["r"], {}),
        lambda: LoraGAN(base_folder(), reward=types_with_batch()),
    ]
    for way in ways:
        with pytest.raises(
            ValueError, match=r"\((self, )?prompts?, answers?\) cannot be called.*Rename the parameters"
        ):
            way()
    assert gan.compute_reward is reward, "the one before stays"
    with pytest.raises(
        ValueError, match=r"needs answer: .*\(prompt, answer\); a reward is called with prompt, response"
    ):
        from_spec(f"{tmp_path / 'mine.py'}:judge")


def types_with_batch():
    class Wrong:
        def __call__(self, response, target):
            return 1.0

        def batch(self, prompts, answers):
            return [1.0]

    return Wrong()


def test_a_function_that_makes_rewards_is_not_taken_for_one():
    def make(n=3) -> Callable:
        return lambda response: 1.0

    def make_by_text(a, b) -> "Callable[[str], float]":
        return lambda response: 1.0

    for factory in (make, make_by_text):
        with pytest.raises(ValueError, match="makes rewards and is not a reward: call it first"):
            LoraGAN(base_folder(), reward=factory)

    def unannotated(response, target):
        return lambda text: 1.0

    with pytest.raises(ValueError, match="If the function makes a reward, call it first"):
        small_gan(reward=unannotated).step(PROMPTS[0])


def test_the_prompt_reaches_a_reward_in_training_as_the_row_has_it():
    seen = []

    def judged(prompt, response):
        seen.append((prompt, response))
        return reward(response)

    record = small_gan(reward=judged).step(PROMPTS[:2], TARGETS[:2])
    pairs = [(p, r) for p, group in zip(record["prompt"], record["responses"], strict=True) for r in group]
    assert seen == pairs
    assert record["true_rewards"] == small_gan().step(PROMPTS[:2], TARGETS[:2])["true_rewards"]
    chat = [{"role": "user", "content": "hi"}]
    score_parts([judged], [chat], ["there"], {})
    assert seen[-1] == (chat, "there")


def test_an_overridden_method_is_matched_by_name():
    class Mine(LoraGAN):
        def compute_reward(self, prompt, response):
            return float(len(prompt))

    record = Mine(base_folder(), **SMALL).step(PROMPTS[:2])
    assert record["true_rewards"] == [[float(len(prompt))] * 4 for prompt in PROMPTS[:2]]


def test_a_reward_that_takes_the_prompt_needs_one():
    with pytest.raises(ValueError, match="takes the prompt: give 1 prompts; none were given"):
        score_pairs(lambda prompt, response: 1.0, ["r"], [None])
    with pytest.raises(ValueError, match="takes the prompt: give 1 prompts; 2 were given"):
        score_pairs(lambda prompt, response: 1.0, ["r"], [None], prompts=["a", "b"])


FORMS = [
    (lambda completion_ids: [], True), (lambda completion_ids, **c: [], True), (lambda completions, response: [], True),
    (lambda prompts, target: [], True), (lambda trainer_state, log_metric, **c: [], True), (lambda text, **c: [], True),
    (lambda response, **c: 1.0, False), (lambda prompt, **c: 1.0, False), (lambda completion, n=1, **c: 1.0, False),
]  # fmt: skip


@pytest.mark.parametrize(("func", "expected"), FORMS)
def test_known_names_tell_the_forms_apart(func, expected):
    assert takes_completions(func) is expected


def test_a_missing_column_is_named_with_the_function_and_the_columns():
    def graded(completions, solution, level, hint=None):
        return [1.0]

    said = r"graded\(completions, solution, level, hint=None\) needs 'solution', 'level'.*columns 'kind', 'target'"
    with pytest.raises(ValueError, match=said):
        require_columns([reward, graded], ["kind"])
    require_columns([graded, lambda completions, **columns: []], ["level", "solution"])
    with pytest.raises(ValueError, match="positional-only. Remove the /"):
        check_reward(lambda completions, /, **columns: [])


def test_names_that_rewards_are_given_are_no_columns():
    assert set(GIVEN) == set(data.RESERVED)
    for name in GIVEN:
        with pytest.raises(ValueError, match=f"a column cannot be called '{name}'"):
            small_gan().step("a", **{name: 1})
        with pytest.raises(ValueError, match=f"a column cannot be called '{name}'"):
            data.read_rows([{"prompt": "a", name: 1}])
