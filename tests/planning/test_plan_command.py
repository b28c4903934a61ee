from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from command_line import CommandLine
from prelort.config import Config
from prelort.planning.memory import Planner


@pytest.fixture
def options(tiny_llama: Path) -> list[str]:
    small = ["model.device=cpu", "data.max_length=48", "training.batch_size=4"]
    return ["--model", str(tiny_llama), *(part for s in small for part in ("--set", s))]


def test_names_the_largest_rank_that_fits(
    command_line: CommandLine, options: list[str], settings: Callable[..., Config]
) -> None:
    budget = Planner(settings()).exact(11).total + 4 * 32**2
    outcome = command_line("plan", *options, "--memory", f"{budget}B")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "(--memory) is 11: it needs" in outcome.out
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("│")]
    fits = {int(row[1]): row[-2] for row in rows}
    # 32 is the smaller dimension of the widest layer: more rank adds nothing.
    assert fits == {2: "yes", 4: "yes", 8: "yes", 16: "no", 32: "no"}


def test_json_has_every_byte(
    command_line: CommandLine, options: list[str], settings: Callable[..., Config]
) -> None:
    outcome = command_line("plan", *options, "--memory", "1GiB", "--ranks", "8, 3", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert (found["memory"], found["largest_rank"]) == (2**30, 32)
    assert [row["rank"] for row in found["ranks"]] == [3, 8]
    exact = Planner(settings()).exact(8)
    row = found["ranks"][1]
    assert row["fits"] is True
    assert (row["adapter"], row["down"], row["sent"]) == (exact.adapter, exact.down, exact.sent)
    assert row["total"] == pytest.approx(exact.total, rel=1e-3)


def test_without_memory_that_of_the_machine_is_taken(
    command_line: CommandLine, options: list[str]
) -> None:
    outcome = command_line("plan", *options, "--ranks", "40")
    assert "(available on this machine now) is 40 (the largest considered)" in outcome.out


def test_where_nothing_fits_is_told_after_the_table(
    command_line: CommandLine, options: list[str]
) -> None:
    outcome = command_line("plan", *options, "--memory", "100 kB")
    assert outcome.error.startswith("not even rank 1 fits: it needs ")
    assert "there are 97.7 KiB; what would help: training.batch_size below 4" in outcome.error
    assert "activations" in outcome.out
    outcome = command_line("plan", *options, "--memory", "100 kB", "--json")
    assert outcome.error.startswith("not even rank 1 fits")
    assert json.loads(outcome.out)["largest_rank"] is None


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["--memory", "8"], "--memory '8' is not a size"),
        (["--ranks", "4,x"], "--ranks '4,x': 'x' is not a rank"),
        (["--ranks", "0"], "--ranks '0': '0' is not a rank"),
        (["--set", "training.batch_size=0"], "training.batch_size = 0 is not allowed"),
        (["--set", "lora.target_modules='nose'"], "'nose' matches no layer"),
        (["--set", "method.name=fedt"], "did you mean 'fedit'?"),
        (["--model", "/no/such/folder"], "there is no such folder"),
    ],
)
def test_mistakes_are_one_sentence(
    command_line: CommandLine, options: list[str], wrong: list[str], sentence: str
) -> None:
    assert sentence in command_line("plan", *options, *wrong).error


def test_an_encoder_cannot_be_planned_as_a_language_model(
    command_line: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    error = command_line("plan", "--model", tmp_path, "--memory", "1GB").error
    assert "no causal model can be built from its configuration" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page's plan is for a CPU")
def test_the_documented_plan_is_what_one_gets(command_line: CommandLine) -> None:
    page = (Path(__file__).parents[2] / "docs" / "choose-ranks.md").read_text()
    command, shown = re.findall(r"^    prelort (plan .*)\n\n```\n(.*?)```", page, re.M | re.S)[0]
    outcome = command_line(*command.split())
    assert [line.strip() for line in outcome.out.splitlines()] == [
        line.strip() for line in shown.splitlines()
    ]


def test_privacy_of_examples_is_planned_for_clients_of_several_sizes(
    command_line: CommandLine, options: list[str]
) -> None:
    more = ["privacy.epsilon=8", "privacy.unit=example", "federation.rounds=2"]
    chosen = [part for one in more for part in ("--set", one)]
    out = command_line("plan", *options, "--memory", "1GiB", *chosen).out
    assert "epsilon = 8 at delta = 1e-05 for each training example, over 2 rounds" in out
    noise = re.findall(r"of ([\d,]+) examples draws .* of (\d+) steps.* ([\d.]+) clip", out)
    assert [found[:2] for found in noise] == [("100", "16"), ("1,000", "16"), ("10,000", "16")]
    assert float(noise[0][2]) > float(noise[1][2]) > float(noise[2][2])


def test_privacy_alone_needs_no_plan_of_memory(command_line: CommandLine) -> None:
    shown = ("plan", "--privacy", "--model", "/no/such/folder", "--set", "partition.clients=50")
    secure = ("--set", "privacy.secure_aggregation=true", "--set", "privacy.min_holders=4")
    few = ("--set", "federation.clients_per_round=10", "--set", "ranks.mix='2*0.8, 16*0.2'")
    assert "nothing is guaranteed" in command_line(*shown).out
    out = command_line(*shown, *secure, *few).out
    assert "7 of a round's 10 clients must stay" in out
    assert "and 4 of those that hold a rank dimension" in out
    assert "2 holders of rank dimension 16 on average: those with fewer than 4 leave it" in out
    assert "epsilon" not in out
    hidden = "privacy.hide_ranks=true", "method.weights=uniform", "federation.clients_per_round=1.0"
    chosen = [part for one in hidden for part in ("--set", one)]
    out = command_line(*shown, *secure, *chosen, "--set", "ranks.mix='2*0.8, 16*0.2'").out
    assert "44 of a round's 50 clients must stay" in out
    unknown = command_line(*shown[:4], *secure).out  # the number of clients is not configured
    assert "a share of 0.67 of a round's clients must stay" in unknown
    noise = ("--set", "privacy.epsilon=8", "--set", "privacy.adaptive_clipping=false")
    out = command_line(*shown, *secure, *noise, *few).out
    assert re.search(r"epsilon = 8 at .*10 of 50 clients take part and add the noise", out)
    assert "must stay" in out
    everyone = ("--set", "federation.clients_per_round=1.0", "--set", "ranks.mix='2*0.8, 16*0.2'")
    stated = command_line(*shown, *secure, *noise, *everyone).out
    hidden_noise = command_line(*shown, *secure, *noise, *everyone, *chosen).out
    # 10 clients add noise to dimension 16, of whom 4 stay for sure; hidden all 50 do, of whom 34.
    ratio = _noise_of_rank(16, stated) / _noise_of_rank(16, hidden_noise)
    assert ratio == pytest.approx(math.sqrt((10 / 4) / (50 / 34)), rel=0.1)
    assert "--json has no plan of privacy" in command_line(*shown, "--json").error


def _noise_of_rank(rank: int, text: str) -> float:
    """The noise of a mean over the holders, in clip norms."""
    found = re.search(rf"holders of rank dimension {rank} has noise of (\S+) clip norms", text)
    assert found is not None
    return float(found[1])
