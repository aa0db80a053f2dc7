"""Tables of figures: every number is there, and no line is wider than a terminal of 80 columns."""

import pytest

from lora_gan.run import evaluation, tables


def figures(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def test_a_cell_has_the_mean_and_its_interval():
    assert tables.cell(figures(0.3)) == "0.300 [0.200, 0.400]"
    assert tables.cell(figures(0.3), 100, 0) == "30 [20, 40]"
    assert tables.cell(None) == tables.cell({"mean": None, "low": None, "high": None}) == "–"


def test_columns_stand_under_their_names():
    text = tables.table(["one", "two"], [["a", "1, 2", "[3]"], ["bb", "4", "[bold]5[/bold]"]])
    head, rule, first, second = text.splitlines()
    assert set(rule) == {"─"} and head.index("two") == first.index("[3]") == second.index("[bold]5[/bold]")
    assert head.index("one") == first.index("1, 2") == second.index("4") == 4


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_evaluations_fit_80_columns(columns):
    metrics = {"true_reward": figures(-0.104), "chrf": figures(97.25), "rewards/exact_match": figures(0.5)}
    result = {"metrics": metrics, "distinct_2": 0.98, "logged": {"format/share_of_answers": 0.25}}
    names = ["generator", "reference", "difference per row"][:columns]
    text = evaluation.table(dict.fromkeys(names, result))
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for word in ("-0.104", "[-0.204,", "-0.004]", "97.250", "[97.150,", "97.350]", "0.980", "0.250"):
        assert words.count(word) == columns
    for name in (*metrics, "distinct_2", "format/share_of_answers"):
        assert any(line.split()[:1] == [name] for line in text.splitlines())
