"""The errors that a user can cause, each told in one sentence."""


class PrelortError(Exception):
    """Something the user can put right. Its text names the value and what is allowed."""


class ConfigError(PrelortError):
    """A configuration, option or input file is wrong."""


class AdapterError(PrelortError):
    """An adapter does not fit: a tensor is missing, surplus, mis-shaped or at another scale."""


class UpdateRefused(PrelortError):
    """A client's reply cannot be used; the reason is logged and the round goes on."""


class QuorumError(PrelortError):
    """Too few clients gave a usable reply, so the global adapter was left as it was."""


class CheckpointError(PrelortError):
    """A checkpoint is missing, damaged or belongs to another run."""
