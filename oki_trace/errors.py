"""Errors that a user can fix.

    OkiTraceError
    ├── UsageError            an invalid argument
    ├── ModelError            a model cannot be found, read, or held in memory
    │   └── CaptureError      the model runs, but a turn cannot be traced
    ├── StoreError            the trace store cannot be opened, read or written
    │   ├── StoreBusy         another process held it for too long
    │   ├── DamagedSteps      the steps of one reply have invalid values
    │   ├── NotFound          no such conversation, message, step or tensor
    │   ├── SchemaError       the store is older or newer than this program, or not ours
    │   └── TensorError       a stored tensor is damaged
    ├── QuestionError         a question across steps cannot be answered
    └── ExchangeError         a file cannot be exported to or imported from

Each message says in one sentence what is wrong and in one how to fix it; the command
line prints it unchanged.
"""

from __future__ import annotations


class OkiTraceError(Exception):
    """The base class of every error that the project raises on purpose."""


class UsageError(OkiTraceError, ValueError):
    """An argument, an option or a combination of them is invalid."""


class ModelError(OkiTraceError):
    """A model cannot be found, read, or held in memory."""


class CaptureError(ModelError):
    """The model is loaded, but this turn cannot be traced with it."""


class StoreError(OkiTraceError):
    """The trace store cannot be opened, read or written."""


class DamagedSteps(StoreError):
    """The steps of one reply have invalid values; other replies can be read."""


class StoreBusy(StoreError):
    """Another process held the store for too long; a later attempt may succeed."""


class NotFound(StoreError, LookupError):
    """No such conversation, message, step or tensor in this store."""


class SchemaError(StoreError):
    """The store's schema is older or newer than this program, or the file is not ours."""


class TensorError(StoreError):
    """A stored tensor does not match its checksum, shape or codec."""


class QuestionError(OkiTraceError):
    """A question across steps cannot be answered: wrong SQL, a limit, or no data."""


class ExchangeError(OkiTraceError):
    """A file cannot be exported to or imported from."""


def named(name: str, default: type[OkiTraceError]) -> type[OkiTraceError]:
    """The class of an error that another process reports; ``default`` for an unknown name."""
    error = globals().get(name)
    return error if isinstance(error, type) and issubclass(error, OkiTraceError) else default
