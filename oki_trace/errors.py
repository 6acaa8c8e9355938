"""Everything that can go wrong in a way the user can mend.

    OkiTraceError
    ├── UsageError            an argument that makes no sense
    ├── ModelError            a model cannot be found, read, or held in memory
    │   └── CaptureError      the model runs, but a turn cannot be traced
    ├── StoreError            the trace store cannot be opened, read or written
    │   ├── StoreBusy         another process held it for too long
    │   ├── NotFound          no such conversation, message, step or tensor
    │   ├── SchemaError       the store is older or newer than this program, or not ours
    │   └── TensorError       a stored tensor is damaged
    ├── QuestionError         a question across steps cannot be answered
    └── ExchangeError         a file cannot be exported to or imported from

The message of each is one sentence that says what is wrong and one that names
the fix; the command line prints it as it is.
"""

from __future__ import annotations


class OkiTraceError(Exception):
    """The root: catch this to catch everything the project raises on purpose."""


class UsageError(OkiTraceError, ValueError):
    """An argument, an option or a combination of them makes no sense."""


class ModelError(OkiTraceError):
    """A model cannot be found, read, or held in memory."""


class CaptureError(ModelError):
    """The model is loaded, but this turn cannot be traced with it."""


class StoreError(OkiTraceError):
    """The trace store cannot be opened, read or written."""


class DamagedSteps(StoreError):
    """The steps of one reply hold what cannot be there; all others can be read."""


class StoreBusy(StoreError):
    """Another process held the store for too long; asking again later may do."""


class NotFound(StoreError, LookupError):
    """No such conversation, message, step or tensor in this store."""


class SchemaError(StoreError):
    """The store's schema is older or newer than this program, or the file is not ours."""


class TensorError(StoreError):
    """A stored tensor does not match its checksum, shape or codec."""


class QuestionError(OkiTraceError):
    """A question across steps cannot be answered: wrong SQL, no time, no room, nothing there."""


class ExchangeError(OkiTraceError):
    """A file cannot be exported to or imported from."""
