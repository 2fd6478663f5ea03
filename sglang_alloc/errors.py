"""Every error a user can cause, each worded as: what was asked, what was found, what to do."""


class AllocError(Exception):
    """Base of all errors that sglang-alloc raises on purpose."""


def reason_of(error: Exception) -> str:
    """Return why a file could not be read, without its path, which the sentence around names."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class SharedTableError(AllocError):
    """The shared table is missing, foreign, of another version, truncated or corrupt."""


class TableInUseError(SharedTableError):
    """Another process already writes the selector of this shared table."""


class TableFormatError(AllocError):
    """A budget table file does not hold what its format promises."""


class ModelMismatchError(AllocError):
    """The budget table was made for another model than the one being served."""


class NotMoEError(AllocError):
    """The model has no Mixture-of-Experts layers, so there is no activation budget to set."""


class UnsupportedServerError(AllocError):
    """SGLang's version, options or internals do not let the budget be enforced."""


class ConfigurationError(AllocError):
    """A setting is unknown, malformed or impossible."""


class RequestBudgetError(AllocError, ValueError):
    """A request asks for a budget of its own that it cannot have; SGLang answers with HTTP 400."""
