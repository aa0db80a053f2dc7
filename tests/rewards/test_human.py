"""The person as the reward: with streams that play the person, and at a real pseudo-terminal."""

import io
import json
import os
import signal
import sys
import threading
import time

import pytest
from helpers import PROMPTS, ROOT, small_gan

from lora_gan.messages import as_text
from lora_gan.rewards import RewardUnavailable, score_trl
from lora_gan.rewards.human import Human
from lora_gan.storage.json_lines import append_line, open_lines


class Answers(io.StringIO):
    """To be asked for more is a failure, not the end of input, which would interrupt the whole test session."""

    def readline(self, *_):
        line = super().readline()
        assert line, "asked for more than was expected"
        return "" if line == "EOF\n" else line


def human(answers: str, **options) -> Human:
    """One whose person types these words, one a line; EOF ends the input."""
    stdin = Answers("".join(f"{answer}\n" for answer in answers.split()))
    return Human(stdin=stdin, stdout=io.StringIO(), **options)


def shown(reward: Human) -> str:
    return reward._stdout.getvalue()


def lines_of(log) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ answers


def test_ratings_become_tenths_in_the_order_of_rows():
    reward = human("0 10 7 8.5 3,5 007 s")
    assert reward(["p"] * 7, list("abcdefg")) == [0, 1, 0.7, 0.85, 0.35, 0.7, None]
    assert reward._stdin.read() == ""


def test_what_is_no_answer_is_asked_again():
    reward = Human(stdin=Answers("\n11\n-1\nnan\n1e1\nten\n7 8\n²\n?\n 4 \n"), stdout=io.StringIO())
    assert reward(["p"], ["r"]) == [0.4]
    text = shown(reward)
    for wrong in ("''", "'11'", "'-1'", "'nan'", "'1e1'", "'ten'", "'7 8'", "'²'"):
        assert f"{wrong} is not an answer: give a number from 0 to 10" in text
    assert text.count("u  Undo") == 1


def test_undo_goes_back_as_often_as_one_likes():
    # At a there is nothing to undo; 1, 2; back to b; skip; at c, back to b, and to a; 5, 6; back to b; 7; 8.
    reward = human("u 1 2 u s u U 5 6 u 7 8")
    assert reward(["p"] * 3, ["a", "b", "c"]) == [0.5, 0.7, 0.8]
    assert shown(reward).count("nothing to undo") == 1


def test_undo_does_not_reach_into_an_earlier_call():
    reward = human("1 u 2")
    assert reward(["p"], ["a"]) == [0.1]
    assert reward(["p", "p"], ["a", "b"]) == [0.1, 0.2]
    assert "nothing to undo" in shown(reward)


def test_equal_pairs_are_asked_for_once_and_the_number_left_is_shown():
    reward = human("1 2 3")
    assert reward(["p", "p", "q", "p"], ["a", "b", "a", "a"]) == [0.1, 0.2, 0.3, 0.1]
    for i in (1, 2, 3):
        assert f"response {i} of 3" in shown(reward)
    assert reward(["q", "p"], ["a", "b"]) == [0.3, 0.2]


@pytest.mark.parametrize("stop", ["q", "Q", "EOF"])  # the end of input, as Ctrl-D
def test_quitting_raises_keyboard_interrupt_and_keeps_what_was_rated(stop, tmp_path):
    reward = human(f"4 {stop}", log=tmp_path / "log.jsonl")
    with pytest.raises(KeyboardInterrupt, match="stopped at response 2 of 3 to rate"):
        score_trl([reward], None, ["p"] * 3, ["a", "b", "c"], {})
    again = human("5 6", log=tmp_path / "log.jsonl")
    assert again(["p"] * 3, ["a", "b", "c"]) == [0.4, 0.5, 0.6]


# ------------------------------------------------------------------------------------------------ what is shown


def test_prompt_and_response_are_shown_as_text_and_nothing_else_of_the_row():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello [bold]you[/bold]?"}]
    reward = human("7 8", show_target=False)
    columns = {"target": ["SECRET", "SECRET"], "model": ["gpt", "gpt"]}
    reward([chat, "q"], [[{"role": "assistant", "content": "Héllo \x1b[31m\x00 {x}"}], ""], **columns)
    text = shown(reward)
    for part in ("system: Be kind.", "user: Hello [bold]you[/bold]?", "Héllo \\x1b[31m\\x00 {x}", "(empty)", "of 2"):
        assert part in text
    assert "SECRET" not in text and "gpt" not in text and "\x1b" not in text
    assert "╭" in text, "in panels"


def test_the_target_is_shown_where_there_is_one_and_a_rating_holds_for_it():
    reward = human("7 8 9 4")
    assert reward(["p"] * 3, ["r"] * 3, target=["Bonjour", None, "Salut"]) == [0.7, 0.8, 0.9]
    text = shown(reward)
    assert text.count("Bonjour") == 1 and text.count("Salut") == 1 and text.count(" target ") == 2
    assert reward(["p"] * 2, ["r"] * 2, target=["Bonsoir", "Salut"]) == [0.4, 0.9], "another target is another question"
    blind = human("6", show_target=False)
    assert blind(["p"] * 2, ["r"] * 2, target=["Bonjour", "Salut"]) == [0.6, 0.6] and "Bonjour" not in shown(blind)


def test_ratings_of_runs_that_showed_no_target_are_not_asked_for_again(tmp_path):
    log = tmp_path / "log.jsonl"
    earlier = human("2 u 7 s 3", log=log, show_target=False)
    assert earlier(["p"] * 3, ["a", "b", "c"], target=["x", "y", "z"]) == [0.7, None, 0.3]
    assert not any("target" in entry for entry in lines_of(log))
    now = human("9", log=log)
    assert now(["p"] * 4, ["a", "b", "c", "d"], target=["x", "y", "z", "z"]) == [0.7, None, 0.3, 0.9]
    assert shown(now).count("response 1 of 1") == 1 and " d " in shown(now)
    assert human("", log=log)(["p"], ["a"], target=["another"]) == [0.7]
    again = human("1", log=log)  # what was rated beside a target holds for that one alone
    assert again(["p"] * 2, ["d", "d"], target=["z", "another"]) == [0.9, 0.1]


def test_a_terminal_that_cannot_show_a_letter_gets_it_escaped():
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    assert Human(stdin=Answers("é\n3\n"), stdout=stdout)(["p"], ["né \ud800"]) == [0.3]
    assert b"n\\xe9 \\ud800" in raw.getvalue() and b"'\\xe9' is not an answer" in raw.getvalue()


def test_chats_become_text():
    assert as_text("plain") == "plain"
    assert as_text([{"role": "user", "content": "one"}]) == "one"
    assert as_text([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a[image]"
    assert (
        as_text([{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]) == "user: q\n\nassistant: "
    )
    for wrong in (3, None, ["text"], {"role": "user"}):
        with pytest.raises(ValueError, match="neither a text nor a list of chat messages"):
            as_text(wrong)


def test_without_a_terminal_it_says_so_before_anything_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("7\n"))
    with pytest.raises(RewardUnavailable, match="stdin and stdout must be a terminal. Start the run in a terminal"):
        Human()(["p"], ["r"])
    with pytest.raises(RewardUnavailable, match="ask: stdin must be a terminal"):
        Human(stdout=io.StringIO())(["p"], ["r"])
    assert capsys.readouterr().out == "" and sys.stdin.read() == "7\n"


# ------------------------------------------------------------------------------------------------ the log


def test_the_log_has_each_answer_as_it_was_given_and_the_last_holds(tmp_path):
    log = tmp_path / "new" / "log.jsonl"
    reward = human("7 u 8 s", log=log)
    assert reward(["p"] * 2, ["été \ud800\n", "b"]) == [0.8, None]
    entries = lines_of(log)
    assert all(entry.pop("time").startswith("20") for entry in entries)
    first = {"prompt": "p", "response": "été \ud800\n"}
    assert entries == [
        {**first, "rating": 7.0},
        {**first, "rating": None, "undone": True},
        {**first, "rating": 8.0},
        {"prompt": "p", "response": "b", "rating": None},
    ]
    assert "été" in log.read_text(encoding="utf-8")
    again = human("", log=log)  # would raise if it asked for anything; a skip is an answer too
    assert again(["p"] * 2, ["b", "été \ud800\n"]) == [None, 0.8]
    assert shown(again) == ""


def test_an_answer_that_was_undone_before_a_crash_is_asked_for_again(tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        human("7 u q", log=log)(["p"] * 2, ["a", "b"])
    assert human("3 4", log=log)(["p"] * 2, ["a", "b"]) == [0.3, 0.4]


def test_a_line_that_a_crash_broke_costs_that_answer_only(tmp_path):
    log = tmp_path / "log.jsonl"
    human("1 2", log=log)(["p"] * 2, ["a", "b"])
    log.write_bytes(log.read_bytes()[:-30])
    assert human("5", log=log)(["p"] * 2, ["a", "b"]) == [0.1, 0.5]
    assert human("", log=log)(["p"] * 2, ["a", "b"]) == [0.1, 0.5]  # with the broken line in the middle


def test_a_line_without_its_line_break_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"a": 1})
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append_line(path, {"b": 2})
    assert open_lines(path) == [{"a": 1}, {"b": 2}]


def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "data.csv"
    for content, message in (
        ("prompt,target\na,b\n", "is not a JSON Lines file"),
        ('{"prompt": "a", "target": "b"}\n', "is not a rating.*has the texts prompt and response, a rating"),
        ('{"prompt": "a", "response": "b", "rating": 11}\n', "is not a rating"),
        ('{"prompt": "a", "response": "b", "rating": NaN}\n', "is not a rating"),
        ('{"prompt": "a", "response": "b", "target": ["t"], "rating": 1}\n', "is not a rating"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            Human(log=path)
        assert path.read_text() == content
    with pytest.raises(OSError):
        Human(log=tmp_path)  # a folder


# ------------------------------------------------------------------------------------------------ signals


def test_ctrl_c_interrupts_where_a_handler_only_takes_note_and_the_handler_is_put_back():
    noted = []

    class Stdin(io.StringIO):
        def readline(self, *_):
            signal.raise_signal(signal.SIGINT)
            return "7\n"

    before = signal.signal(signal.SIGINT, lambda *_: noted.append(1))
    try:
        ours = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            Human(stdin=Stdin(), stdout=io.StringIO())(["p"], ["r"])
        assert noted == [] and signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_may_ask():
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(human("7")(["p"], ["r"])))
    thread.start()
    thread.join(10)
    assert answers == [0.7]


class Terminal:
    """A Python of its own at a pseudo-terminal of its own, as under a person's fingers."""

    def __init__(self, code: str, *arguments: str):
        import pty

        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
            os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until `text` was printed after what an earlier call waited for."""
        import select

        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end and select.select([self.terminal], [], [], seconds)[0], self.seen
            try:
                chunk = os.read(self.terminal, 4096)
            except OSError:  # Linux's word for "the other side has closed"
                chunk = b""
            assert chunk, f"ended without {text!r}:\n{self.seen}"
            self.seen += chunk.decode()
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def exit_code(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.terminal)
        return code


PERSON = """
import signal, sys
noted = []
signal.signal(signal.SIGINT, lambda *_: noted.append(1))  # as fit() does: only takes note
from lora_gan.rewards.human import Human
reward = Human(log=sys.argv[1])
try:
    print("got", reward(["What is 1 + 1?"] * 4, ["two", "three", "four", "five"]))
except KeyboardInterrupt as stop:
    print(f"interrupted ({stop}), noted {len(noted)}")
signal.raise_signal(signal.SIGINT)
print("then noted", len(noted))
"""


@pytest.mark.slow  # new Pythons that import torch
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_a_person_at_a_terminal(tmp_path):
    log = tmp_path / "log.jsonl"
    person = Terminal(PERSON, str(log))
    person.wait_for("What is 1 + 1?")
    person.wait_for("response 1 of 4")
    person.wait_for("two")
    person.wait_for("> ")
    person.type("9\n")
    person.wait_for("response 2 of 4")
    person.wait_for("> ")
    person.type("\n")
    person.wait_for("'' is not an answer")
    person.wait_for("> ")
    person.type("5\x7f4\n")  # the terminal's own editing: backspace
    person.wait_for("response 3 of 4")
    person.wait_for("> ")
    person.type("\x03")  # Ctrl-C
    person.wait_for("interrupted (), noted 0")
    person.wait_for("then noted 1")
    assert person.exit_code() == 0
    assert [(entry["response"], entry["rating"]) for entry in lines_of(log)] == [("two", 9), ("three", 4)]

    person = Terminal(PERSON, str(log))
    person.wait_for("response 1 of 2")  # two are left
    person.wait_for("four")
    person.wait_for("> ")
    person.type("\x04")  # Ctrl-D
    person.wait_for("interrupted (stopped at response 1 of 2 to rate), noted 0")
    assert person.exit_code() == 0

    person = Terminal(PERSON, str(log))
    person.wait_for("> ")
    person.type("1\n")
    person.wait_for("response 2 of 2")
    person.wait_for("> ")
    person.type("s\n")
    person.wait_for("got [0.9, 0.4, 0.1, None]")
    assert person.exit_code() == 0


# ------------------------------------------------------------------------------------------------ in a run


def test_two_steps_with_a_person_as_the_reward(tmp_path):
    log = tmp_path / "log.jsonl"
    reward = Human(stdin=Answers("7\n2.5\ns\n10\n" * 4), stdout=io.StringIO(), log=log)
    gan = small_gan(reward_funcs=[reward])
    for _ in range(2):
        out = gan.step(PROMPTS[:2], ["a target", None])
        assert out["gen_loss"] is not None and out["disc_loss"] is not None
        ratings = {(entry["prompt"], entry["response"]): entry["rating"] for entry in lines_of(log)}
        for prompt, responses, rewards in zip(out["prompt"], out["responses"], out["true_rewards"], strict=True):
            for response, value in zip(responses, rewards, strict=True):
                rating = ratings[prompt, response]
                assert value is None if rating is None else value == pytest.approx(rating / 10, abs=1e-6)
    assert len(lines_of(log)) > 8  # the second step asked, too


def test_quitting_leaves_the_step_untaken():
    gan = small_gan(reward_funcs=[human("7 3 q")])
    with pytest.raises(KeyboardInterrupt, match="stopped at response 3 of"):
        gan.step(PROMPTS[0])
    assert gan.global_step == 0
