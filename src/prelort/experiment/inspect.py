"""Measuring the adapter of a run again, and exporting a prefix of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prelort import config as configuration
from prelort import methods
from prelort.config import PYTHON, Config
from prelort.errors import CheckpointError, ConfigError
from prelort.events import Evaluated
from prelort.experiment import adapter_folder, checkpoint, exported
from prelort.experiment.assemble import assemble, prepare_model
from prelort.experiment.deterministic import deterministic
from prelort.experiment.evaluation import check_ranks, global_adapters
from prelort.experiment.folder import RunFolder, is_taken
from prelort.experiment.measure import Progress, measure
from prelort.files import as_path
from prelort.library_logging import quiet
from prelort.methods.interface import ServerState
from prelort.models import base
from prelort.models.lora import ADAPTER, install
from prelort.tasks import labels

EVALUATION_SECTIONS = ("data", "evaluation", "model", "threads")
"""Parts of the configuration that may differ when a run is measured again."""


@quiet()
def evaluate_run(
    path: Path | str, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Evaluated:
    """Measure a run's newest adapter and the untuned base again, with the run's threads.

    ``overrides`` change the configuration. Raises `ConfigError` if they change more than how the
    run is measured.
    """
    folder = RunFolder(as_path(path))
    trained = folder.read_config()
    config = configuration.load(folder.config_file, overrides)
    for key in configuration.differences(trained, config):
        if key.split(".")[0] not in EVALUATION_SECTIONS:
            raise ConfigError(
                f"{key} cannot differ from the run's own: only keys of "
                f"{', '.join(EVALUATION_SECTIONS)} can, which say how it is measured"
            )
    config = _with_labels(config, folder.path)
    if config.partition.by == PYTHON:  # of the rows that were given; other rows are dealt evenly
        dealt = config.partition.model_copy(update={"by": "iid"})
        config = config.model_copy(update={"partition": dealt})
    with deterministic(config.threads):
        return _evaluated(config, folder, progress)


def _evaluated(config: Config, folder: RunFolder, progress: Progress | None) -> Evaluated:
    assembly = assemble(config)
    state = _newest_state(folder, assembly.runtime.spec.base)
    check_ranks(config, assembly.initial.rank)
    method = methods.build(config.method, config.seed)
    if methods.trait(method, "personal"):
        raise ConfigError(f"method {config.method.name!r} leaves no global model to measure")
    started = time.monotonic()
    adapters = {0: assembly.initial, **global_adapters(config, method, state)}
    metrics = measure(config, [assembly.runtime], assembly.test, adapters, progress)
    untuned = metrics.pop(0)
    seconds = time.monotonic() - started
    return Evaluated(state.round, metrics, seconds, base=untuned)


@quiet()
def export_run(
    path: Path | str,
    out: Path | str,
    rank: int | None = None,
    *,
    merge: bool = False,
    base_name: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the adapter cut to ``rank`` to ``out``: a PEFT folder, or a whole merged model.

    ``base_name``: the base model that the PEFT folder names, instead of the path used here.
    ``dtype``: of a merged model; default: the base's. The result is loaded again and its logits
    compared. Raises `ConfigError` for a rank that the adapter does not have, an ``out`` that is not
    empty and a quantised base to merge into, `AdapterError` if the logits differ.
    """
    folder, out = RunFolder(as_path(path)), as_path(out)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype = {dtype!r} is not allowed: float32, bfloat16 or float16")
    config = _with_labels(folder.read_config(), folder.path)
    if is_taken(out):
        raise ConfigError(f"{str(out)!r} exists and is not empty: choose another --out")
    state, rounds = _newest_state(folder, base.fingerprint(config.model)), config.federation.rounds
    method = methods.build(config.method, config.seed)
    if methods.trait(method, "personal"):
        raise ConfigError(f"method {config.method.name!r} leaves no global model to export")
    if state.round == 0:
        raise CheckpointError(f"{str(folder.path)!r} has nothing to export: no round has finished")
    if state.round < rounds:
        warnings.warn(f"exported after round {state.round} of {rounds}", stacklevel=2)
    max_rank = method.global_adapter(state).rank
    rank = max_rank if rank is None else rank
    if not isinstance(rank, int) or not 1 <= rank <= max_rank:
        raise ConfigError(f"rank {rank!r} is not allowed: the adapter has ranks 1 to {max_rank}")
    tokenizer = base.load_tokenizer(config.model)
    names = config.data.labels or ()
    runtime, _ = prepare_model(config, tokenizer, rank=state.adapter.rank, labels=names)
    adapter = method.global_adapter(state, rank)
    if not merge:
        template = runtime.model.peft_config[ADAPTER]
        if base_name is not None:
            template = replace(template, base_model_name_or_path=base_name)
        name = template.base_model_name_or_path or config.model.name
        card = adapter_folder.model_card(config, folder.history(), name, rank)
        adapter_folder.write(out, adapter, template, tokenizer, names, card)
        exported.check_adapters(config.model, runtime, names, {out: adapter})
        return out
    if getattr(runtime.model.get_base_model(), "is_quantized", False):
        raise ConfigError(
            "--merge needs a base that is not quantised, since rounding the sum again would change "
            "it: export without --merge and load the adapter beside the quantised base"
        )
    install(runtime.model, adapter)
    measured = exported.logits(runtime, runtime.model)
    rounding = exported.tolerance(runtime.model)
    merged = exported.merge(config.model, runtime, adapter, getattr(torch, dtype or "", None))
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    exported.check_merged(out, runtime, names, measured, rounding)
    return out


def _with_labels(config: Config, path: Path) -> Config:
    """The configuration with the class names of the run, whatever its data have now."""
    names = labels.read(path) or config.data.labels
    return config.model_copy(update={"data": config.data.model_copy(update={"labels": names})})


def _newest_state(folder: RunFolder, base_fingerprint: str) -> ServerState:
    newest = checkpoint.load_latest(folder.checkpoints, base_fingerprint)
    if newest is None:
        raise CheckpointError(f"{str(folder.path)!r} has no checkpoint yet")
    return newest.state
