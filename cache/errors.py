"""Every error this project raises on purpose.

    OffloadError                    base; the CLI prints its message as one line and exits with code 2
    ├── BudgetError                 a byte budget is negative, unparsable, or too small
    ├── BusyError                   the model is in use, and the caller would not wait or is that use itself
    ├── ContextError                more tokens than the context budget, or a context longer than the model's
    ├── DeviceError                 a device or link that this machine does not have
    ├── FormatError                 a storage format that does not exist
    ├── ModelError                  the model cannot be used
    │   ├── UnknownModelError       no such folder or hub id, or the hub cannot be reached
    │   ├── NotMoEError             a dense model: nothing to offload
    │   └── UnsupportedFamilyError  a MoE design that is not served, named, with the reason
    ├── CheckpointError             a shard or config.json is missing, damaged, or fits no model
    ├── StoreError                  converted experts are missing, damaged, or of another checkpoint
    ├── DiskSpaceError              not enough room for what must be written
    ├── OutputError                 a result cannot be written where it is to go
    ├── ProfileError                a machine profile is missing, damaged, or lacks what is asked of it
    ├── PolicyError                 an eviction policy or predictor is unknown, unloadable or faulty
    ├── TraceError                  a routing trace is damaged, does not fit, or cannot be recorded
    └── TransferError               reading an expert or moving it failed while the model was running

A message says what happened, the numbers, and what to do next, in one line.
Programming mistakes (a key committed twice, a pin released twice) raise `ValueError` or `RuntimeError`: they
are not for users, and are never caught.
"""


class OffloadError(Exception):
    """Base of every error a user can cause or meet."""


class BudgetError(OffloadError):
    """A byte budget is negative, unparsable, or too small."""


class BusyError(OffloadError):
    """The model is in use by a call that the caller would not wait for, or is a part of."""


class ContextError(OffloadError):
    """More tokens than the context budget allows, or a context longer than the model's."""


class DeviceError(OffloadError):
    """A device or link that this machine does not have."""


class FormatError(OffloadError):
    """A storage format that does not exist."""


class ModelError(OffloadError):
    """The model cannot be used."""


class UnknownModelError(ModelError):
    """No such folder or hub id, or the hub cannot be reached."""


class NotMoEError(ModelError):
    """A dense model: there are no experts to offload."""


class UnsupportedFamilyError(ModelError):
    """A MoE design that is not served."""


class CheckpointError(OffloadError):
    """The checkpoint on disk is incomplete, damaged, or does not fit the model."""


class StoreError(OffloadError):
    """Converted experts are missing, damaged, or were made from another checkpoint."""


class DiskSpaceError(OffloadError):
    """Not enough free disk space for what must be written."""


class OutputError(OffloadError):
    """A result cannot be written where it is to go."""


class PolicyError(OffloadError):
    """An eviction policy or predictor is unknown, cannot be loaded, or returns nonsense."""


class ProfileError(OffloadError):
    """A machine profile is missing, damaged, or lacks what is asked of it."""


class TraceError(OffloadError):
    """A routing trace is damaged or does not fit what it is used for, or cannot be recorded."""


class TransferError(OffloadError):
    """Reading or moving an expert failed while the model was running."""
