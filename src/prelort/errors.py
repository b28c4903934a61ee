"""Errors that a user can cause; their texts are one sentence."""


class PrelortError(Exception):
    """An error that the user can correct. Its text names the value and what is allowed."""


class ExtensionError(PrelortError):
    """A method, task or function of a user's own failed; the text may contain their data."""


class ConfigError(PrelortError):
    """A configuration, option or input file is wrong."""


class AdapterError(PrelortError):
    """An adapter does not fit: a tensor is missing, unknown, of another shape or scale."""


class UpdateRefused(PrelortError):
    """A client's reply cannot be used; the reason is logged and the round goes on."""


class QuorumError(PrelortError):
    """Too few clients gave a usable reply, so the global adapter is unchanged."""


class BudgetSpentError(QuorumError):
    """No client gave a usable reply, since those that were asked have no privacy budget left."""


class CheckpointError(PrelortError):
    """A checkpoint is missing, damaged or belongs to another run."""
