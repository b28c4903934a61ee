"""Published methods by name. To add one, write one file and one line here.

A class outside the package is named ``package.module:Class`` in ``method.name``.
"""

from __future__ import annotations

from prelort.config import MethodConfig
from prelort.errors import ConfigError
from prelort.extensions import calling, imported, unknown_name
from prelort.methods.fed_plora import FedPlora
from prelort.methods.fedex_lora import FedExLora
from prelort.methods.fedhl import FedHL
from prelort.methods.fedit import FedIT
from prelort.methods.fedmomentum import FedMomentum
from prelort.methods.fedrora import FedRora
from prelort.methods.fedrot_lora import FedRotLora
from prelort.methods.fedsa_lora import FedSaLora
from prelort.methods.ffa_lora import FfaLora
from prelort.methods.flexlora import FlexLora, HLora
from prelort.methods.flora import Flora, Florist
from prelort.methods.fslora import FsLora
from prelort.methods.hetlora import HetLora
from prelort.methods.homogeneous import HomogeneousMax, HomogeneousMin
from prelort.methods.interface import (
    Aggregator,
    Broadcast,
    Client,
    Method,
    ServerState,
    Update,
)
from prelort.methods.lora_fair import LoraFair
from prelort.methods.prefix import PrefixMethod
from prelort.methods.prelort import PreLort
from prelort.methods.prelort_sorted import PreLortSorted
from prelort.methods.raflora import RaFlora
from prelort.methods.replication import Replication
from prelort.methods.rolora import RoLora
from prelort.methods.zero_padding import ZeroPadding

REGISTRY: dict[str, type[Method]] = {
    method.name: method
    for method in (
        PreLort,
        PreLortSorted,
        Replication,
        FedPlora,
        ZeroPadding,
        FedIT,
        HetLora,
        Flora,
        Florist,
        FlexLora,
        HLora,
        RaFlora,
        FfaLora,
        RoLora,
        FsLora,
        FedExLora,
        FedMomentum,
        FedRotLora,
        FedHL,
        LoraFair,
        FedSaLora,
        FedRora,
        HomogeneousMin,
        HomogeneousMax,
    )
}

__all__ = [
    "REGISTRY",
    "Aggregator",
    "Broadcast",
    "Client",
    "Method",
    "PrefixMethod",
    "ServerState",
    "Update",
    "build",
    "find",
    "trait",
]


def find(name: str) -> type[Method]:
    """The class of a registered method, or of ``package.module:Class``.

    Modules are also searched in the current folder. Raises `ConfigError` with the nearest known
    name, or with what the class lacks to be a `Method`.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if ":" in name:
        return imported(name, "method", Method, ("name",))
    raise ConfigError(unknown_name("method", name, REGISTRY))


def build(config: MethodConfig, seed: int) -> Method:
    """The configured method; ``seed`` is the run's.

    Raises `ConfigError` for options of a method that does not exist, `ExtensionError` for what a
    constructor of one's own raises.
    """
    for name in config.options:
        if name != config.name and name not in REGISTRY:
            raise ConfigError(f"method.options.{name}: there is no method {name!r}")
    kind = find(config.name)
    with calling(f"method {config.name!r}", "its constructor"):
        return kind(config, seed)


def trait(method: Method | type[Method], name: str) -> bool:
    """A trait of `PrefixMethod` (``personal``, ``ignores_ranks``); False where it has none."""
    return bool(getattr(method, name, False))
