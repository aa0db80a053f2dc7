"""What a card says of the run's own evaluations, of its start and of its licence.

Oracles: the lines of metrics.jsonl, and huggingface_hub's own reading of the metadata.
"""

import functools
import json
import re

import jinja2
import pytest
from helpers import PROMPTS, TARGETS, base_folder, reward, small_gan
from huggingface_hub import ModelCard

from lora_gan import LoraGAN
from lora_gan.cli import main as cli
from lora_gan.export import facts
from lora_gan.export.licences import IDS, licence_id

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exported(gan, folder, **options):
    gan.export(folder, parts=["generator"], **options)
    return ModelCard.load(folder / "generator" / "README.md")


def table_of(card, heading):
    """Rows of cells of the section's table."""
    section = card.text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_the_runs_first_and_last_evaluation_are_there(tmp_path, logging_steps):
    gan = small_gan(output_dir=str(tmp_path / "run"), eval_steps=2, logging_steps=logging_steps)
    gan.fit(ROWS, steps=5, eval_dataset=ROWS[:3], progress=False)
    judged = [line for line in lines_of(tmp_path / "run") if "eval_true_reward" in line]
    assert [line["step"] for line in judged] == [0, 2, 4, 5]
    found = exported(gan, tmp_path / "out")
    head, _, *rows = table_of(found, "Evaluations during the run")
    assert head == ["metric", "before training", "step 5"]
    expected = {
        name.removeprefix("eval_"): [f"{line[name]:.6g}" for line in (judged[0], judged[-1])]
        for name in judged[0]
        if name.startswith("eval_")
    }
    assert {name: values for name, *values in rows} == expected and "true_reward" in expected
    assert "no evaluation on held-out prompts" not in found.text

    early = LoraGAN.from_checkpoint(tmp_path / "run" / "step-5", reward=reward)
    early.global_step = 3  # weights of an earlier step have the evaluations up to it
    heads = [line["step"] for line in facts._evaluations(early, facts._logged(early), True)]
    assert heads == [0, 2]


def test_one_evaluation_is_one_column(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "run"), eval_on_start=False)
    gan.fit(ROWS, steps=2, eval_dataset=ROWS[:3], progress=False)
    assert table_of(exported(gan, tmp_path / "out"), "Evaluations during the run")[0] == ["metric", "step 2"]


def test_a_run_without_evaluations_and_the_lines_of_another_run(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "run"))
    gan.fit(ROWS, steps=2, progress=False)
    text = exported(gan, tmp_path / "out").text
    assert "Evaluations during the run" not in text and "no evaluation on held-out prompts" in text
    small_gan(output_dir=str(tmp_path / "other"), query_rate=0.5).fit(
        ROWS, steps=3, eval_dataset=ROWS[:3], progress=False
    )
    other = small_gan(output_dir=str(tmp_path / "other"))
    assert "Evaluations during the run" not in exported(other, tmp_path / "untrained").text
    for _ in range(2):
        other.step(PROMPTS[:2])
    assert "Evaluations during the run" not in exported(other, tmp_path / "stepped").text


def test_an_evaluation_that_is_handed_in_stands_beside_them(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "run"))
    gan.fit(ROWS, steps=1, eval_dataset=ROWS[:3], progress=False)
    text = exported(gan, tmp_path / "out", evaluation=gan.evaluate(ROWS)).text
    assert text.index("## Evaluations during the run") < text.index(
        "## Evaluation\n\nMean and 95 % bootstrap interval over 6 rows"
    )


def test_the_evaluation_of_this_generator_is_in_the_metadata(tmp_path):
    """As the hub shows it; an evaluation by another name may be of another model, and a discriminator is not judged."""
    gan = small_gan()
    judged = gan.evaluate(ROWS)
    gan.export(tmp_path / "out", evaluation=judged)
    found = {path.parent.name: ModelCard.load(path).data for path in (tmp_path / "out").glob("*/README.md")}
    for part in ("generator", "generator-merged"):
        results = {result.metric_type: result for result in found[part].eval_results}
        means = {name: value["mean"] for name, value in judged["metrics"].items() if name != "pred_reward"}
        assert {name: result.metric_value for name, result in results.items()} == means and "true_reward" in means
        assert {(result.task_type, result.dataset_name) for result in results.values()} == {
            ("text-generation", "6 prompts of the maker")
        }
        assert part in found[part].model_name
    for part in ("discriminator", "discriminator-merged"):
        assert found[part].eval_results is None and "model-index" not in found[part].to_dict()
    assert exported(gan, tmp_path / "two", evaluation={"base": judged, "trained": judged}).data.eval_results is None


# --- the template


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:the base has a chat template, and the prompts are plain")
def test_the_template_uses_no_name_that_it_is_not_given(tmp_path, monkeypatch, base):
    """jinja2 writes nothing for an unknown name; here it raises."""
    strict = functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined)
    monkeypatch.setattr(jinja2, "Template", strict)
    gan = small_gan(base_folder(base), output_dir=str(tmp_path / "run"), eval_steps=1)
    gan.export(tmp_path / "untrained")
    if base == "llama":
        gan.players.base.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    gan.fit(ROWS, steps=1, eval_dataset=ROWS[:3], progress=False)
    gan.export(tmp_path / "out", evaluation=gan.evaluate(ROWS), license="mit")
    for path in tmp_path.glob("*/*/README.md"):
        text = path.read_text(encoding="utf-8")
        assert "{%" not in text and "{{" not in text and "\n\n\n" not in text and text.endswith(".\n")
        assert not re.search(r"[ \t]$", text, re.MULTILINE)


# --- the licence


@pytest.mark.parametrize("given", ["apache-2.0", "Apache-2.0", "other", "llama3.1"])
def test_a_licence_is_in_the_metadata(tmp_path, given):
    found = exported(small_gan(), tmp_path / "out", license=given)
    assert found.data.license == given.lower()
    section = found.text.partition("## Licence\n\n")[2].partition("\n\n##")[0]
    assert section == (f"`{given.lower()}`, as given by its author. The licence of the base also applies.")


def test_without_one_the_card_names_none(tmp_path):
    found = exported(small_gan(), tmp_path / "out")
    assert found.data.license is None and "Its author must add one" in found.text


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("apache", "apache-2.0"),
        ("mitt", "mit"),
        ("cc-by", "cc-by-4.0"),
        ("gpl3", "gpl-3.0"),
        ("", "apache-2.0"),
        (3, "other"),
    ],
)
def test_an_unknown_licence_is_refused_with_near_ones(tmp_path, given, hint):
    with pytest.raises(ValueError, match="is not a licence id of the hub") as error:
        small_gan().export(tmp_path / "out", license=given)
    assert hint in str(error.value) and "'other'" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_id_is_its_own():
    assert len(set(IDS)) == len(IDS) and all(licence_id(name.upper()) == name for name in IDS)


def test_the_command_line_takes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_gan(base_folder(), output_dir="run").save_checkpoint()
    words = ["export", "--checkpoint", "run", "--output_dir", "out", "--parts", "generator"]
    assert cli.main([*words, "--license", "apache"]) == 2
    assert "did you mean apache-2.0" in capsys.readouterr().err
    assert cli.main([*words, "--license", "apache-2.0"]) == 0
    assert ModelCard.load("out/generator/README.md").data.license == "apache-2.0"


# --- where the generator started


@pytest.mark.parametrize("kl_reference", ["base", "init_adapter"])
def test_the_start_and_the_reference_are_named(tmp_path, kl_reference):
    start = small_gan()
    start.step(PROMPTS[:2])
    folder = start.save_checkpoint(ckpt_dir=tmp_path / "private") / "generator"
    gan = LoraGAN(base_folder(), reward=reward, init_adapter=folder, kl_reference=kl_reference)
    text = exported(gan, tmp_path / "untrained").text
    assert "No training step was taken: the adapter equals the adapter that it started from." in text
    gan.step(PROMPTS[:2])
    text = exported(gan, tmp_path / "out").text
    assert "| the generator started from | the adapter `step-1` |" in text
    assert ("| KL to that adapter |" in text, "| KL to the base |" in text) == (
        kl_reference == "init_adapter", kl_reference == "base",
    )  # fmt: skip
    assert str(tmp_path) not in text.replace(str(tmp_path / "out"), ""), "whose folder it lay in is private"
    assert "started from" not in exported(small_gan(), tmp_path / "plain").text
