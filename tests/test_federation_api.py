"""`prelort.Federation`: objects in, the same folder and the same bits out as from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
)

import prelort
from prelort import EarlyStopping, Federation
from prelort.config import Config, PartitionConfig
from prelort.errors import ConfigError
from prelort.history import RunHistory
from prelort.methods import PrefixMethod
from random_adapters import same_bits

Rows = list[dict[str, Any]]
RANKS = {f"site-{index}": rank for index, rank in enumerate((2, 2, 4, 4, 8, 8))}
SHORT: dict[str, Any] = {
    "data": {"max_length": 32},
    "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "warmup": 0.0}
    | {"gradient_accumulation": 1},
    "federation": {"clients_per_round": 3},
    "threads": 1,
}


class Own(PrefixMethod):
    """A method of one's own."""

    name, summary, paper, default_objective = "own", "PreLort by another name", "none", "plain"


class Unbuilt(Own):
    """A method with a mistake in its constructor."""

    def __init__(self, config: Any, seed: int) -> None:
        self.share = config.share


@pytest.fixture
def rows(text_file: Path) -> Rows:
    return [json.loads(line) for line in text_file.read_text().splitlines()]


@pytest.fixture
def sites(rows: Rows) -> dict[str, Dataset]:
    return {name: Dataset.from_list([r for r in rows if r["client"] == name]) for name in RANKS}


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def words(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_objects_give_the_bits_that_files_give(
    make_config: Callable[..., Config],
    llama: Any,
    words: Any,
    sites: dict[str, Any],
    tmp_path: Path,
) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    sites["site-1"] = sites["site-1"].to_pandas()
    federation = Federation(llama, words, sites, ranks=RANKS, **SHORT)
    stopped = federation.run(3, tmp_path / "own", callbacks=[lambda history: history.round == 1])
    assert (stopped.history.done, stopped.history.finished) == (1, True)
    other = Federation(
        llama, words, {**sites, "site-2": sites["site-2"].select([0, 1, 2])}, ranks=RANKS, **SHORT
    )
    with pytest.raises(ConfigError, match="own' has other rows than the ones given"):
        other.run(3, tmp_path / "own", resume=True)
    result = federation.run(3, tmp_path / "own", resume=True)
    expected = prelort.run(make_config(), tmp_path / "files")
    assert same_bits(result.global_adapter, expected.global_adapter)
    assert result.metrics == expected.metrics
    assert result.base == expected.base
    assert llama.state_dict().keys() == before.keys()  # no layer was put into the user's model
    assert all(value.equal(before[name]) for name, value in llama.state_dict().items())
    assert all(weight.requires_grad for weight in llama.parameters())


def test_a_model_that_is_in_no_files_is_kept_in_the_run(
    llama: Any, words: Any, sites: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        llama.lm_head.weight += 0.1
    ranks = {"target_modules": ["q_proj", "v_proj"]}
    federation = Federation(llama, words, sites, ranks=RANKS, lora=ranks, **SHORT)
    result = federation.run(1, tmp_path / "run")
    loaded = AutoPeftModelForCausalLM.from_pretrained(result.adapter(3))
    assert loaded.get_base_model().lm_head.weight.equal(llama.lm_head.weight)
    assert AutoTokenizer.from_pretrained(result.adapter(3)).get_vocab() == words.get_vocab()
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(result.model(3)(ids).logits, loaded.eval()(ids).logits)
    other = [f"data.source={text_file}", f"data.test={text_file}"]
    assert prelort.evaluate(result.path, other).base != result.base
    with torch.no_grad():
        llama.lm_head.weight += 0.1
    with pytest.raises(ConfigError, match="base' has another LlamaForCausalLM than the one given"):
        federation.run(2, tmp_path / "run", resume=True)


def test_own_metrics_are_measured_at_every_rank(
    tiny_bert: Path, words: Any, rows: Rows, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, id2label={0: "late", 1: "early"}, label2id={"late": 0, "early": 1}
    )
    shapes = set()

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.add((prediction.predictions.shape, prediction.label_ids.shape))
        return {"own": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    settings = {**SHORT, "federation": {"clients_per_round": 3, "rounds": 1}}
    federation = Federation(
        model, words, pd.DataFrame(rows), ranks="2*0.5, 4*0.5", compute_metrics=metrics, **settings
    )
    result = federation.run(out=tmp_path / "run")
    assert result.history.done == 1
    assert shapes == {((12, 2), (12,))}
    assert all(values["own"] == values["accuracy"] for values in result.metrics.values())
    assert set(result.to_pandas()["metric"]) == {"accuracy", "macro_f1", "own", "loss"}
    labels = json.loads((result.adapter(4) / "labels.json").read_text())["label2id"]
    assert labels == {"late": 0, "early": 1}  # as the model's head has them


def test_a_causal_models_metrics_get_tokens(
    llama: Any, words: Any, sites: dict[str, Any], tmp_path: Path
) -> None:
    found: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        found.append(prediction)
        return {"one": 1}

    settings = {**SHORT, "evaluation": {"batch_size": 1}}
    Federation(llama, words, sites, ranks=4, compute_metrics=metrics, **settings).run(
        1, tmp_path / "run"
    )
    predictions, labels = found[0].predictions, found[0].label_ids
    assert predictions.shape == labels.shape
    ids = torch.as_tensor(labels[0][labels[0] != -100])[None]
    assert predictions[0][: ids.shape[1]].tolist() == llama(ids).logits[0].argmax(-1).tolist()


def test_a_run_that_improves_no_more_ends(
    llama: Any, words: Any, sites: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**SHORT, "evaluation": {"every": 1}}
    federation = Federation(llama, words, sites, ranks=4, **settings)
    never = EarlyStopping("loss", patience=2, min_delta=100.0)
    result = federation.run(9, tmp_path / "run", callbacks=[never])
    assert result.history.done == 2
    assert result.adapter(4).is_dir()
    always: list[RunHistory] = []
    result = federation.run(
        4, tmp_path / "all", callbacks=[EarlyStopping(patience=9), always.append]
    )
    assert (result.history.done, len(always)) == (4, 4)


def test_a_callback_that_fails_loses_no_round(
    llama: Any, words: Any, sites: dict[str, Any], tmp_path: Path
) -> None:
    federation = Federation(llama, words, sites, ranks=4, **SHORT)
    with pytest.raises(prelort.PrelortError, match="a function raised ZeroDivisionError"):
        federation.run(2, tmp_path / "run", callbacks=[lambda history: 1 // 0])
    first = (tmp_path / "run" / "checkpoints" / "00001" / "state.safetensors").read_bytes()
    kind: Any = EarlyStopping  # the class in place of an object answers with an object
    with pytest.raises(ConfigError, match="callbacks must return True, False or None, not Early"):
        federation.run(2, tmp_path / "run", resume=True, callbacks=[lambda history: kind()])
    assert (tmp_path / "run" / "checkpoints" / "00001" / "state.safetensors").read_bytes() == first
    assert federation.run(2, tmp_path / "run", resume=True).history.done == 2


def test_methods_are_compared_on_own_rows_and_partition(
    llama: Any, words: Any, rows: Rows, tmp_path: Path
) -> None:
    federation = Federation(
        llama,
        words,
        Dataset.from_list(rows),
        ranks={"even": 2, "odd": 4},
        partition=lambda all_rows: {
            "even": range(0, len(all_rows), 2),
            "odd": range(1, len(all_rows), 2),
        },
        **{**SHORT, "federation": {"clients_per_round": 2}},
    )
    results = federation.compare(["prelort", Own], 1, tmp_path / "out", seeds=[0, 1])
    assert [cell.status for cell in results.cells] == ["finished"] * 4
    assert set(results.clients["client"]) == {"even", "odd"}
    assert f"{__name__}:Own" in results.methods
    assert prelort.read(tmp_path / "out").to_pandas().equals(results.to_pandas())


def test_a_comparison_that_is_refused_leaves_nothing(
    llama: Any, words: Any, sites: dict[str, Any], tmp_path: Path
) -> None:
    federation = Federation(llama, words, sites, ranks=RANKS, **SHORT)
    with pytest.raises(ConfigError, match="fedit"):
        federation.compare(["fedit"], 1, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"compare\.reference = 'flora' is not"):
        federation.compare(["prelort"], 1, tmp_path / "out", reference="flora")
    assert not (tmp_path / "out").exists()


def test_pefts_configuration_says_layers_scale_and_rank(llama: Any, words: Any, rows: Rows) -> None:
    lora = LoraConfig(r=4, lora_alpha=2, target_modules=["v_proj", "q_proj"], lora_dropout=0.1)
    dealt = PartitionConfig(by="iid", clients=3)
    config = Federation(llama, words, rows, lora=lora, partition=dealt).config
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (config.lora.scale, config.lora.dropout, config.ranks.mix) == (0.5, 0.1, "4*1")
    assert config.partition == dealt
    for name, value in (("use_dora", True), ("init_lora_weights", "pissa")):
        with pytest.raises(ConfigError, match=f"{name} = {value!r} is not supported: .* base"):
            Federation(llama, words, rows, lora=LoraConfig(**{name: value}))
    with pytest.raises(ConfigError, match="init_lora_weights = 'gaussian' is not supported"):
        Federation(llama, words, rows, lora=LoraConfig(init_lora_weights="gaussian"))
    stacks = LoraConfig(target_parameters=["experts.up", "experts.down"])
    lora = Federation(llama, words, rows, lora=stacks).config.lora
    assert (lora.target_modules, lora.target_parameters) == ((), ("experts.down", "experts.up"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"method": "prelorr"}, "unknown method 'prelorr': did you mean 'prelort'"),
        ({"method": "poetry"}, "known are .*, or 'package.module:Class' for one of your own"),
        ({"method": dict}, "'builtins:dict' is no method: it lacks .*, which a class derived from"),
        ({"method": {"name": "hetlora", "options": {"hetlora": {"gama": 1}}}}, "mean 'gamma'"),
        ({"method": Unbuilt}, "Unbuilt': its constructor raised AttributeError: .*'share'"),
        ({"task": "poetry"}, "known are .*, or 'package.module:Class' for one of your own"),
        ({"ranks": 0}, "'0' is not a rank"),
        ({"ranks": {**RANKS, "site-0": 2.0}}, r"'2\.0' is not a rank"),
        ({"ranks": [2, 4]}, "the list has 2 ranks for 6 clients"),
        ({"ranks": "2*0.5, 4*0.2"}, "the shares sum to 0.7"),
        ({"data": {"source": "a.csv"}}, r"data\.source is for rows that are read: here they are"),
        ({"data": {"test": "a.csv"}}, r"data\.test is for rows that are read"),
        ({"data": {"max_train_examples": 9}}, r"data\.max_train_examples is for rows that are"),
    ],
)
def test_what_a_federation_is_made_of_is_checked_at_once(
    llama: Any, words: Any, sites: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(prelort.PrelortError, match=sentence):
        Federation(llama, words, **{**SHORT, "datasets": sites, **changes})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"datasets": {}}, "datasets has no client"),
        ({"datasets": {"a": [{"text": "x"}], "b": [{"t": "x"}]}}, "must have the same columns"),
        ({"datasets": {1: [{"text": "x"}], "1": [{"text": "y"}]}}, "two clients of one name"),
        ({"datasets": DatasetDict(test=Dataset.from_list([{"text": "x"}]))}, "are no clients"),
        ({"datasets": {"": [{"text": "x"}], "b": [{"text": "x"}]}}, "a client without a name"),
        ({"datasets": pd.DataFrame([["x", "y"]], columns=["text", "text"])}, "Duplicate column"),
        ({"datasets": [{"text": "x"}, {"text": 3}]}, "datasets cannot be read as a table"),
        ({"partition": lambda rows: rows["nope"]}, "partition: the function raised"),
        ({"track": "wandb"}, r"track must be a list of names, such as \['wandb'\]"),
        ({"resume": True}, "holds no run"),
        ({"datasets": pd.DataFrame({"text": [1j, 2j]})}, "cannot be read as a table: .*complex128"),
        ({"datasets": 3}, "datasets must be a datasets.Dataset, .* not int"),
        ({"ranks": {"site-0": 2}}, "ranks names the clients site-0, and the data are those of"),
        ({"ranks": 2.5}, "ranks 2.5 are neither a rank"),
        ({"lora": 4}, "lora 4 is neither"),
        ({"method": 3}, "method 3 is neither a name"),
        ({"compute_metrics": 3}, "compute_metrics 3 is not a function"),
        ({"partition": {"a": [0.5]}}, "'a' has .0.5., allowed are row numbers"),
        ({"partition": {"a": [0, 1], "b": [1]}}, "row 1 is listed twice, of 'a' and 'b'"),
        ({"partition": {"a": [True, False, True]}}, "row 1 is listed twice, of 'a'"),
        ({"partition": {"a": [99]}}, "'a' has row 99, and the rows are 0 to 71"),
        ({"partition": {"a": [0]}}, "client 'a' has 1 rows, at least 2 are needed"),
        ({"task": "classification"}, "the task needs a model for SequenceClassification"),
        ({"training": {"rate": 1}}, "unknown key 'training.rate'"),
        ({"callbacks": [EarlyStopping()]}, "EarlyStopping needs evaluations"),
        (
            {
                "callbacks": [EarlyStopping()],
                "evaluation": {"every": 1},
                "privacy": {"epsilon": 8.0},
            },
            "EarlyStopping with privacy.epsilon would end the run by what is measured on clients",
        ),
        ({"compute_metrics": lambda prediction: 1}, "compute_metrics must return numbers by name"),
        ({"compute_metrics": lambda prediction: {"loss": 1}}, "and none named 'loss'"),
        ({"datasets": Path("none.csv")}, "data.source = '.*none.csv': there is no such file"),
        ({"method": type("Local", (Own,), {})}, "must be a class at the top of a module"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    llama: Any,
    words: Any,
    rows: Rows,
    sites: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    run = {key: changes.pop(key) for key in ("callbacks", "track", "resume") if key in changes}
    data = rows if "partition" in changes else sites
    settings = {**SHORT, "datasets": data, **changes}
    with pytest.raises(prelort.PrelortError, match=sentence):
        Federation(llama, words, **settings).run(1, tmp_path / "run", **run)
    assert not (tmp_path / "run").exists()


def test_clients_may_be_numbered(llama: Any, words: Any, rows: Rows) -> None:
    for ranks in ({2: 4, 1: 2}, pd.Series({2: 4, 1: 2}), np.array([2, 4])):
        federation = Federation(llama, words, {1: rows[:8], 2: rows[8:]}, ranks=ranks)
        assert federation.config.ranks.mix == "2, 4"
    assert Federation(llama, words, rows, ranks=np.int64(4)).config.ranks.mix == "4*1"


def test_a_model_with_adapters_is_refused(llama: Any, words: Any, rows: Rows) -> None:
    adapted: Any = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="give a model of transformers without adapters"):
        Federation(adapted, words, rows).run(1, "unused")
    wrapped: Any = torch.nn.DataParallel(llama)
    with pytest.raises(ConfigError, match=r"DataParallel: give .*, and not what wraps it"):
        Federation(wrapped, words, rows).run(1, "unused")


def test_an_adapter_goes_to_the_hub_under_a_name_that_others_find(
    llama: Any, words: Any, sites: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, Any] = {}

    def upload(api: HfApi, *, repo_id: str, folder_path: Path) -> Any:
        config = json.loads((folder_path / "adapter_config.json").read_text())
        card = (folder_path / "README.md").read_text()
        uploaded.update(repo=repo_id, config=config, card=card)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}"})

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda api, repo, **more: type("Repo", (), {"repo_id": repo})
    )
    result = Federation(llama, words, sites, ranks=RANKS, **SHORT).run(1, tmp_path / "run")
    with pytest.raises(ConfigError, match="is on this machine only: give base_name"):
        result.push_to_hub("me/tuned", rank=4)
    assert result.push_to_hub("me/tuned", rank=3, base_name="a/llama") == "https://hub/me/tuned"
    assert (uploaded["config"]["r"], uploaded["repo"]) == (3, "me/tuned")
    assert uploaded["config"]["base_model_name_or_path"] == "a/llama"
    assert "base_model: a/llama" in uploaded["card"]
    assert "| rank 8 |" in uploaded["card"]
    assert "--max-lora-rank 8`" in uploaded["card"]  # vLLM has no 3


def test_a_plan_is_a_data_frame(make_config: Callable[..., Config]) -> None:
    plan = prelort.plan(make_config(), memory="1GiB", ranks=[4, 8])
    assert plan.largest is not None
    assert list(plan.to_pandas()["rank"]) == [4, 8]
    assert plan.to_pandas()["fits"].all()
    assert "not even rank 1 fits" in repr(prelort.plan(make_config(), memory=1000))
