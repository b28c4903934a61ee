"""Wrong input: one sentence with the value and what is allowed, exit code 2, no traceback, nothing
overwritten, nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import CommandLine, Outcome

CASES: dict[str, list[str]] = {
    # One override for a run: words of the sentence. Values that the configuration itself refuses
    # are in tests/test_config.py, wrong mixes in tests/data/test_ranks.py.
    "ranks.mix=2, 2, 4, 4, 8, 0": ["ranks.mix", "'0' is not a rank", "at least 1"],
    "ranks.mix=2, 4": ["the list has 2 ranks for 6 clients"],
    "ranks.assign=largest": ["ranks.assign", "'by-size'"],
    "method.name=prelrt": ["'prelrt'", "did you mean 'prelort'?"],
    "method.name=quux": ["unknown method 'quux'", "prelort", "zero-padding", "fedit"],
    "method.name=no_such_module:Method": ["cannot be imported", "No module named"],
    "method.name=json:Method": ["cannot be imported", "'Method'"],
    "method.name=json:dumps": ["is not a class"],
    "task=causal": ["unknown task 'causal'", "did you mean 'causal-lm'?"],
    "data.text_column=txt": ["'txt' is not a column", "'client'", "'text'", "'label'"],
    "partition.column=hospital": ["'hospital'", "'client'"],
    "partition.by=dirichlett": ['"dirichlett"', "'dirichlet'", "'shards'"],
    "evaluation.metrics=['perplexiti']": ["perplexiti", "'perplexity'"],
    "evaluation.metrics=['accuracy']": ["'accuracy'", "'causal-lm'", "perplexity"],
    "federation.round=3": ["unknown key 'federation.round'", "did you mean 'rounds'?"],
    "federation.rounds=many": ['federation.rounds = "many"', "integer"],
    "training.learning_rate=inf": ["learning_rate", "finite number"],
    "federation.timeout=inf": ["federation.timeout", "finite number"],
    "federation.quorum=5": ["federation.quorum = 5 needs 5 replies", "3 of 6 clients"],
    "federation.clients_per_round=9": ["clients_per_round = 9", "6 clients"],
    "lora.target_modules=['query_key_value']": ["'query_key_value'", "down_proj", "q_proj"],
    "evaluation.prefixes=[2, 16]": ["evaluation.prefixes: 16", "rank 8"],
    "method.truncations=[2, 32]": ["method.truncations: 32", "rank 8"],
    "method.name=fedit": ["'fedit' needs one rank", "[2, 4, 8]", "'prelort'"],
    "method.level_weights={3 = 1.0}": ["'3' is not a rank level", "2, 4, 8"],
    "method.level_weights={8 = 1.0}": ["nothing to train for a client of rank 2"],
    "data.source=nowhere.csv": ["data.source = 'nowhere.csv'", "no such file"],
    "data.source=sites": ["data.source = 'sites' has no rows here"],
    "data.test=nowhere.jsonl": ["data.test = 'nowhere.jsonl'"],
    "model.name=./no/such/model": ["model.name = './no/such/model'", "no such folder"],
    "model.device=tpu9": ["model.device = 'tpu9'", "auto, cpu, cuda or balanced"],
    "seed": ["--set 'seed'", "key=value"],
}


@pytest.mark.parametrize("override, words", CASES.items(), ids=CASES)
def test_a_wrong_value_is_one_sentence(
    tmp_path: Path,
    command_line: CommandLine,
    config_file: Path,
    override: str,
    words: list[str],
) -> None:
    error = command_line("run", config_file, "--set", override, "--out", tmp_path / "run").error
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []  # the corrected command can use the same --out


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_asked_for_and_absent(
    tmp_path: Path, command_line: CommandLine, config_file: Path, device: str
) -> None:
    options = ["--set", f"model.device={device}", "--out", tmp_path / "run"]
    error = command_line("run", config_file, *options).error
    assert error == f"model.device = '{device}', but no CUDA device is available: use 'cpu'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.jsonl", b""),
        ("head.csv", b"client,text\n"),
        ("broken.jsonl", b'{"text": "a", "client": "b"}\n{"text": '),
        ("binary.jsonl", bytes(range(256))),
        ("broken.parquet", b"PAR1 but not really"),
        ("page.html", b"<html>"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, command_line: CommandLine, config_file: Path, name: str, content: bytes
) -> None:
    source = tmp_path / name
    source.write_bytes(content)
    out = tmp_path / "run"
    error = command_line("run", config_file, "--set", f"data.source={source}", "--out", out).error
    assert name in error
    assert not out.exists()
    assert source.read_bytes() == content


def test_clients_without_enough_text_are_left_out_as_long_as_enough_are_left(
    tmp_path: Path, command_line: CommandLine, config_file: Path
) -> None:
    def run(out: str, short: int, *more: str) -> Outcome:
        words = ["the"] * short + ["the quick brown fox jumps over a lazy dog " * 3] * (6 - short)
        rows = [{"client": f"site-{i}", "text": text} for i, text in enumerate(words) for _ in "ab"]
        source = tmp_path / f"{out}.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
        options = [f"data.source={source}", "federation.clients_per_round=6", *more]
        sets = [part for option in options for part in ("--set", option)]
        return command_line("run", config_file, *sets, "--out", tmp_path / out)

    fine = run("two", 2)
    assert fine.code == 0
    assert (
        "no usable example (too short a text, or no assistant turn): 2 ('site-0', 'site-1')"
        in fine.err
    )
    assert "left out: 2 more with 2 rows" in (tmp_path / "two" / "clients.txt").read_text()
    assert "quorum = 5 needs 5 replies" in run("quorum", 2, "federation.quorum=5").error
    assert (
        "no usable example (too short a text, or no assistant turn), at any of its 6 clients"
        in run("all", 6).error
    )


def test_an_encoder_without_a_task_says_which_task_is_its_own(
    tmp_path: Path, command_line: CommandLine, config_file: Path, tiny_bert: Path
) -> None:
    options = ["--set", f"model.name={tiny_bert}", "--out", tmp_path / "run"]
    error = command_line("run", config_file, *options).error
    assert "no causal language model but of type 'bert': set task = \"classification\"" in error


def test_a_label_unseen_in_training_is_named(
    tmp_path: Path, command_line: CommandLine, classification_file: Path
) -> None:
    test = tmp_path / "test.jsonl"
    rows = [{"text": "red cats", "label": "early"}, {"text": "blue boxes", "label": "never"}]
    test.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    options = ["--set", f"data.test={test}", "--out", out]
    error = command_line("run", classification_file, *options).error
    assert "data.test: row 2 has the label 'never', which is none of the classes" in error
    assert not out.exists()


def test_a_model_with_pickled_weights_alone_is_refused(
    tmp_path: Path, command_line: CommandLine, config_file: Path, tiny_llama: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, model / "pytorch_model.bin")
    options = ["--set", f"model.name={model}", "--out", tmp_path / "run"]
    error = command_line("run", config_file, *options).error
    assert "no safetensors weights" in error
    assert "pickled weights are never loaded" in error


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist"),
        (b"[model\nname = 1", "is not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"[data]\nsauce = 'x.csv'", "unknown key 'data.sauce': did you mean 'source'?"),
        (b"model = 3", "model = 3 is not allowed"),
        (b"seed = " + b"[" * 5000, "is not valid TOML"),
    ],
)
def test_a_wrong_configuration_file_is_one_sentence(
    command_line: CommandLine, tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "my.toml"
    if content is not None:
        file.write_bytes(content)
    assert words in command_line("run", file, "--out", tmp_path / "run").error
    assert not (tmp_path / "run").exists()


class TestNothingIsOverwritten:
    def test_a_folder_with_files_is_refused(
        self, tmp_path: Path, command_line: CommandLine, config_file: Path
    ) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        for methods in ([], ["-m", "prelort", "-m", "zero-padding"]):
            error = command_line("run", config_file, *methods, "--out", tmp_path).error
            assert "exists and is not empty: choose another --out" in error
            assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_below_a_file_is_refused(
        self, tmp_path: Path, command_line: CommandLine, config_file: Path
    ) -> None:
        (tmp_path / "file").write_text("mine")
        for methods in ([], ["-m", "prelort", "-m", "zero-padding"]):
            out = tmp_path / "file" / "run"
            error = command_line("run", config_file, *methods, "--out", out).error
            assert "cannot be written: Not a directory" in error
        assert (tmp_path / "file").read_text() == "mine"

    def test_the_second_methods_error_keeps_the_first_ones_run(
        self, tmp_path: Path, command_line: CommandLine, config_file: Path
    ) -> None:
        out = tmp_path / "several"
        methods = ("-m", "prelort", "-m", "fedit")
        outcome = command_line("run", config_file, *methods, "--out", out, "-q")
        assert outcome.code == 1
        assert "'fedit' needs one rank" in outcome.out
        assert (out / "prelort" / "adapters" / "rank-8" / "adapter_model.safetensors").is_file()
        assert (out / "study.toml").is_file()
        assert not (out / "fedit").exists()


def test_a_rank_above_the_smaller_dimension_warns_and_goes_on(
    tmp_path: Path, command_line: CommandLine, config_file: Path
) -> None:
    options = ["--set", "ranks.mix=2*0.5, 20*0.5", "--out", tmp_path / "run"]
    outcome = command_line("run", config_file, *options)
    assert outcome.code == 0
    (warning,) = (line for line in outcome.err.splitlines() if line.startswith("warning:"))
    assert "rank 20 is above the smaller dimension of layer" in warning
    assert "(16)" in warning
    assert (tmp_path / "run" / "adapters" / "rank-20").is_dir()


@pytest.mark.parametrize("arguments", [["run", "--out"], ["evaluate"], ["site", "stop"]])
def test_a_path_that_cannot_be_is_one_sentence_without_wrong_advice(
    command_line: CommandLine, arguments: list[str]
) -> None:
    error = command_line(*arguments, "x" * 300).error
    assert "File name too long" in error or "does not exist" in error
    assert "--resume" not in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "--nonsense"], "No such option"),
        (["runn"], "No such command"),
        (["export", "somewhere"], "Missing option"),
        (["evaluate"], "Missing argument"),
        (["export", "x", "--out", "y", "--rank", "many"], "not a valid int"),
    ],
)
def test_wrong_options_are_refused_by_the_command_line(
    command_line: CommandLine, arguments: list[str], words: str
) -> None:
    outcome = command_line(*arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [["run", "--set", "federation.round=3"], ["run", "nowhere.toml"]],
)
def test_as_a_shell_sees_it(tmp_path: Path, arguments: list[str]) -> None:
    """The same in a real process."""
    ended = subprocess.run(
        [sys.executable, "-m", "prelort", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
