"""A site whose trainer is several processes, as on a machine with several GPUs; here on the CPU."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch

from prelort import config as configuration
from prelort import methods
from prelort.deployment import settings, trainer_client
from prelort.deployment.ipc import Reply, Request, address_of
from prelort.deployment.worker import Worker, make_client
from prelort.errors import ConfigError, PrelortError
from prelort.experiment.at_sites import dealt_site
from prelort.federation import messages, wire
from prelort.federation.content import blob_in, content_of, text_in
from prelort.federation.requests import evaluate_request, train_request
from prelort.methods import Client, ServerState
from prelort.training.processes import Processes
from tiny_models import trained_adapter

PARALLEL = {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1}
SHARDED = PARALLEL | {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}

EXAMPLE = "method.objective=example training.gradient_accumulation=2 training.max_grad_norm=0.05"
CASES = [
    f"{EXAMPLE} training.batch_size=5",
    f"{EXAMPLE} training.gradient_checkpointing=true training.batch_truncations=true",
    # One row a pass, which only one of the processes has; the penalty of its tail counts once.
    "method.name=hetlora training.batch_size=1",
]
LONG = f"{EXAMPLE} training.local_steps=3000"
MEASURE = "measure"

Trained = tuple[dict[str, torch.Tensor], float]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    file = tmp_path_factory.mktemp("federation") / "federation.toml"
    rows = file.with_name("rows.jsonl")
    texts = [f"def f{n}(x): return x * {n} + {n % 7}" for n in range(50)]
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values = {
        "threads": 1,
        "model": {"name": str(tiny_llama), "device": "cpu"},
        "data": {"source": str(rows), "max_length": 12},
        "evaluation": {"at_clients": True},
        "partition": {"by": "iid", "clients": 2},
        "ranks": {"mix": "2, 4", "assign": "in-order"},
        "federation": {"clients_per_round": 1.0},
        # Without the optimiser's division by the gradient's size, which also enlarges its rounding.
        "training": {"optimizer": "sgd", "learning_rate": 1.0, "local_steps": 4},
    }
    file.write_text(tomli_w.dumps(values))
    return file


@pytest.fixture(scope="module")
def requests(federation: Path) -> dict[str, Request]:
    """A request to train for each of the cases, and one to measure."""
    client = dealt_site(configuration.load(federation), 1)
    spec = client.runtime.spec
    state = ServerState(trained_adapter(client.runtime.model, spec.scale), levels=(2, 4))
    receiver = Client(client.name, client.rank, len(client.examples))

    def request(overrides: str) -> Request:
        measures = overrides == MEASURE
        config = configuration.load(federation, [] if measures else shlex.split(overrides))
        method = methods.build(config.method, config.seed)
        if measures:
            content = evaluate_request(config, spec, method.broadcast(state, receiver), 1, [0, 2])
        else:
            content = train_request(config, spec, method, state, receiver, with_validation=False)
        kind = "evaluate" if measures else "train"
        return Request(kind, str(federation), (), text_in(content) or "", blob_in(content))

    return {case: request(case) for case in (*CASES, LONG, MEASURE)}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """The same site in one process."""
    file = tmp_path_factory.mktemp("alone") / "site.toml"
    file.write_text("partition = 1")
    return Worker(file)


@pytest.fixture(scope="module")
def alone(requests: dict[str, Request], worker: Worker) -> list[Trained]:
    """What one process trains in each case."""
    return [trained(worker.answer(requests[case])) for case in CASES]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    file = tmp_path / "site.toml"
    write(file, PARALLEL)
    yield file
    trainer_client.stop(file, seconds=1.0)


def write(file: Path, accelerate: dict[str, Any], quantization: str = "none") -> None:
    (file.parent / "accelerate.yaml").write_text(json.dumps(accelerate))  # JSON is YAML
    trainer, model = {"accelerate": "accelerate.yaml"}, {"quantization": quantization}
    file.write_text(tomli_w.dumps({"partition": 1, "trainer": trainer, "model": model}))


def send(site: Path, request: Request) -> Reply:
    return trainer_client.send(site, settings.read(site), request)


def trained(reply: Reply) -> Trained:
    """The adapter and the loss."""
    assert reply.refused is None
    content = content_of(reply.text, reply.blob)
    header = wire.header(content, messages.TrainReply)
    return wire.adapter(content, header, {})[0].tensors(), header.loss


def measured(reply: Reply) -> messages.EvaluateReply:
    assert reply.refused is None
    return wire.header(content_of(reply.text, reply.blob), messages.EvaluateReply)


def processes_of(site: Path) -> list[psutil.Process]:
    """The launcher, the process that replies, and the one that follows it."""
    first = psutil.Process(int(address_of(site).pid.read_text()))
    launcher = first.parent()
    assert launcher is not None
    return [launcher, first, *(p for p in launcher.children() if p != first)]


def assert_end(processes: list[psutil.Process]) -> None:
    assert len(processes) == 3
    assert psutil.wait_procs(processes, timeout=20)[1] == []


@pytest.mark.parametrize("accelerate", [PARALLEL, SHARDED], ids=["data parallel", "fsdp"])
def test_two_processes_train_what_one_would(
    site: Path,
    accelerate: dict[str, Any],
    requests: dict[str, Request],
    alone: list[Trained],
    worker: Worker,
) -> None:
    write(site, accelerate)
    late = requests[LONG]
    late = replace(late, text=json.dumps(json.loads(late.text) | {"timeout": 2.0}))
    assert "timed out after 2 s at local step" in str(send(site, late).refused)
    first = processes_of(site)
    for case, (adapter, loss) in zip(CASES, alone, strict=True):
        found, found_loss = trained(send(site, requests[case]))
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for name, tensor in adapter.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=5e-6, msg=name)
    found, expected = (
        measured(send(site, requests[MEASURE])),
        measured(worker.answer(requests[MEASURE])),
    )
    assert found.weight == expected.weight
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.prefixes[0] == pytest.approx(expected.prefixes[0], rel=1e-5)
    assert found.prefixes[0] != pytest.approx(found.prefixes[2], rel=1e-5)
    assert processes_of(site) == first
    trainer_client.stop(site)
    assert_end(first)


@pytest.mark.chaos  # half a minute, for a second start of processes
def test_fsdp_splits_a_base_in_4_bits(
    site: Path, requests: dict[str, Request], tmp_path: Path
) -> None:
    file = tmp_path / "alone.toml"
    file.write_text('partition = 1\nmodel.quantization = "4bit"')
    adapter, loss = trained(Worker(file).answer(requests[CASES[0]]))
    write(site, SHARDED, "4bit")
    found, found_loss = trained(send(site, requests[CASES[0]]))
    assert found_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found, adapter, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "site, overrides, sentence",
    [
        ("rank = 'auto'", (), "rank = 'auto' does not know what FSDP saves"),
        (
            "",
            ("lora.modules_to_save=['lm_head']",),
            r"modules that are trained in full \(lm_head\)",
        ),
    ],
)
def test_what_fsdp_cannot_do_is_refused(
    federation: Path, site: str, overrides: tuple[str, ...], sentence: str
) -> None:
    file = federation.with_name("site.toml")
    file.write_text(f"partition = 1\n{site}")
    split = Processes(device="cpu", split=lambda model: None)
    with pytest.raises(ConfigError, match=sentence):
        make_client(configuration.load(federation, overrides), settings.read(file), file, split)


@pytest.mark.chaos
def test_a_killed_process_ends_the_others_and_the_message_gets_new_ones(
    site: Path, requests: dict[str, Request], alone: list[Trained]
) -> None:
    send(site, requests[CASES[0]])
    errors: list[str] = []

    def work() -> None:
        with pytest.raises(PrelortError) as error:
            send(site, requests[LONG])
        errors.append(str(error.value))

    sender = threading.Thread(target=work)
    sender.start()
    killed: list[psutil.Process] = []
    for times in (1, 2):
        while trainer_log(site).count("train: started") <= times:
            time.sleep(0.1)
        time.sleep(0.5)
        killed += processes_of(site)
        killed[-1].kill()
    sender.join()
    assert errors == ["its trainer died twice on this message: the log at the site says why"]
    found, _ = trained(send(site, requests[CASES[0]]))  # the next round
    torch.testing.assert_close(found, alone[0][0], rtol=1e-5, atol=2e-6)
    assert_end(killed[:3])
    assert_end(killed[3:])


def trainer_log(site: Path) -> str:
    return (site.parent / "state" / "trainer.log").read_text()
