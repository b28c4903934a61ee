"""A study's file: which cells it means, and what is wrong with a bad one, in one sentence."""

from pathlib import Path

import pytest

from prelort.config import load as load_config
from prelort.config import to_toml
from prelort.errors import ConfigError
from prelort.study.definition import Study, folder_name, load, of_folder, of_run

STUDY = """
[federation]
rounds = 5
[training]
learning_rate = 1e-3
[compare]
methods = ["prelort", "zero-padding", "segment-wise only"]
seeds = [3, 1]
[compare.settings]
"dirichlet 0.1" = ["partition.by=dirichlet", "partition.alpha=0.1"]
iid = ["partition.by=iid", "federation.rounds=7"]
[compare.overrides]
zero-padding = ["training.learning_rate=2e-3"]
"segment-wise only" = ["method.name=prelort", "method.objective=plain"]
"""


def study_of(folder: Path, text: str = STUDY, *overrides: str, **options: object) -> Study:
    file = folder / "study.toml"
    file.write_text(text)
    return load(file, overrides, **options)  # type: ignore[arg-type]


def test_a_cell_for_each_setting_method_and_seed(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    assert [(c.seed, c.setting, c.method) for c in study.cells] == [
        (seed, setting, method)
        for seed in (3, 1)
        for setting in ("dirichlet 0.1", "iid")
        for method in ("prelort", "zero-padding", "segment-wise only")
    ]
    assert len({cell.folder for cell in study.cells}) == 12
    first, last = study.cells[0], study.cells[-1]
    assert first.folder == Path("dirichlet-0.1/prelort/seed-3")
    assert first.name == "dirichlet 0.1, prelort, seed 3"
    assert (first.config.seed, first.config.partition.alpha) == (3, 0.1)
    assert last.folder == Path("iid/segment-wise-only/seed-1")
    assert (last.config.method.name, last.config.method.objective) == ("prelort", "plain")
    assert study.reference == "prelort"


def test_the_setting_changes_the_file_and_the_methods_own_change_the_setting(
    tmp_path: Path,
) -> None:
    cells = {
        (cell.setting, cell.method): cell.config
        for cell in study_of(tmp_path, STUDY, "federation.rounds=6").cells
    }
    rounds = {key: config.federation.rounds for key, config in cells.items()}
    assert rounds["dirichlet 0.1", "prelort"] == 6  # --set is the file's
    assert rounds["iid", "prelort"] == 7
    rates = {key: config.training.learning_rate for key, config in cells.items()}
    assert rates["iid", "prelort"] == 1e-3
    assert rates["iid", "zero-padding"] == rates["dirichlet 0.1", "zero-padding"] == 2e-3


def test_without_a_file_it_is_the_embedded_default() -> None:
    study = load(methods=["zero-padding", "hetlora"], seeds=[4])
    assert [cell.config.seed for cell in study.cells] == [4, 4]
    assert study.cells[1].folder == Path("hetlora/seed-4")
    assert study.reference == "zero-padding"  # prelort is not there
    default = load_config(None, ["seed=4", "method.name=zero-padding"])
    assert study.cells[0].config == default


@pytest.mark.parametrize("options", [{}, {"methods": ["prelort"], "seeds": [9]}])
def test_the_resolved_study_is_a_file_that_means_the_same(
    tmp_path: Path, options: dict[str, object]
) -> None:
    study = study_of(tmp_path, STUDY, "federation.rounds=6", **options)
    again = study_of(tmp_path, study.to_toml())
    assert again.cells == study.cells
    assert again.reference == study.reference


class TestRuns:
    def test_a_run_is_a_study_of_one_cell(self) -> None:
        study = of_run(None, ["seed=4"], ["zero-padding"])
        (cell,) = study.cells
        assert study.is_run
        assert (cell.folder, cell.name) == (Path(), "zero-padding")
        assert cell.config == load_config(None, ["seed=4", "method.name=zero-padding"])
        assert (study.methods, study.seeds, study.settings) == (("zero-padding",), (4,), ("",))

    def test_a_studys_file_is_no_runs(self, tmp_path: Path) -> None:
        (tmp_path / "study.toml").write_text(STUDY)
        with pytest.raises(ConfigError, match="prelort compare"):
            of_run(tmp_path / "study.toml")


class TestFolders:
    def test_hold_the_study_that_was_written_to_them(self, tmp_path: Path) -> None:
        for study in (study_of(tmp_path), of_run(methods=["prelort", "fedit"])):
            (tmp_path / "study.toml").write_text(study.to_toml())
            assert of_folder(tmp_path) == study

    def test_hold_a_run(self, tmp_path: Path) -> None:
        study = of_run(None, ["seed=4"])
        (tmp_path / "config.toml").write_text(to_toml(study.base))
        assert of_folder(tmp_path) == study


SMALL = '[compare]\nmethods = ["prelort"]\nseeds = [0]\n'
SETTINGS = "[compare.settings]\n"
OVERRIDES = "[compare.overrides]\n"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('[compare]\nmethods = ["prelorr"]', "unknown method 'prelorr': did you mean 'prelort'?"),
        (
            '[compare]\nmethod = ["prelort"]',
            "unknown key 'compare.method': did you mean 'methods'?",
        ),
        ("[compare]\nseeds = [1, 1]", "compare.seeds: 1 is listed twice"),
        ("[compare]\nseeds = [-1]", "compare.seeds = -1 is not allowed: "),
        ('[compare]\nmethods = "prelort"', "is not allowed: input should be a list"),
        ('[compare]\nseeds = "0"', 'compare.seeds = "0" is not allowed: '),
        ("compare = 3", "compare = 3 is not allowed: it is a section"),
        (
            '[compare]\nreference = "hetlora"',
            "compare.reference = 'hetlora' is not compared: choose",
        ),
        ('[compare]\nmetric = "accuracy"', "compare.metric = 'accuracy' is not measured: task 'ca"),
        ('[compare]\nmetric = "bleu"', 'compare.metric = "bleu" is not allowed: '),
        (SMALL + SETTINGS + 'x = ["federation.round=2"]', "unknown key 'federation.round'"),
        (
            SMALL + SETTINGS + 'x = ["federation.rounds=0"]',
            "setting 'x', 'prelort': federation.rou",
        ),
        (SMALL + SETTINGS + 'x = ["rounds"]', "compare.settings, 'x': 'rounds' is not of the form"),
        (SMALL + SETTINGS + 'x = ["seed=2"]', "'seed=2' is not allowed: compare.seeds sets that"),
        (SMALL + SETTINGS + 'x = ["method.name=fedit"]', "compare.methods sets that for each cell"),
        (SMALL + SETTINGS + '"a b" = []\n"a/b" = []', "would share the folder 'a-b': rename one"),
        (SMALL + SETTINGS + '"..." = []', "'...' has no letter or digit for a folder"),
        (SMALL + OVERRIDES + 'fedit = ["threads=1"]', "'fedit' is not compared: compare.methods"),
        (
            SMALL + OVERRIDES + 'prelort = ["seed=2"]',
            "compare.overrides, 'prelort': 'seed=2' is no",
        ),
        (SMALL + OVERRIDES + 'prelort = ["sed=2"]', "compare, 'prelort': unknown key 'sed'"),
        (SMALL + '[compare.tuned.""]\nfedit = ["threads=1"]', "compare.tuned: 'fedit' is not comp"),
        (SMALL + "[compare.tuned.iid]\nprelort = []", "there is no setting 'iid'"),
        (SMALL + "[federation]\nrounds = 0", "federation.rounds = 0 is not allowed"),
    ],
)
def test_a_bad_study_is_told_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        study_of(tmp_path, text)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_some_methods_of_a_tuned_study_are_a_study_that_can_be_repeated(tmp_path: Path) -> None:
    rate = '["training.learning_rate=7e-3"]'
    text = STUDY + f"[compare.tuned.iid]\nprelort = {rate}\nzero-padding = {rate}\n"
    part = study_of(tmp_path, text, methods=["prelort"])
    assert study_of(tmp_path, part.to_toml()).cells == part.cells
    assert {c.setting for c in part.cells if c.config.training.learning_rate == 7e-3} == {"iid"}


def test_a_variant_without_a_method_says_how_to_name_one(tmp_path: Path) -> None:
    text = '[compare]\nmethods = ["nested only"]\n'
    with pytest.raises(ConfigError, match=r"'nested only' = \['method.name=prelort', ...\]"):
        study_of(tmp_path, text)


@pytest.mark.parametrize(
    "name, folder",
    [("dirichlet 0.1", "dirichlet-0.1"), ("my.module:Own", "my.module-Own"), ("../x", "x")],
)
def test_names_make_readable_folders(name: str, folder: str) -> None:
    assert folder_name(name) == folder
