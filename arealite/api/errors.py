"""The errors users meet. Every message says what was found, what was expected, and what to change.

Raised everywhere; caught only at the boundaries listed in tests/test_architecture.py.
"""

SENTENCE = "arealite: "  # begins the line of an error that is told without its traceback, and its class's name follows
SHOWN_NAMES = 5  # in a message


class ArealiteError(Exception):
    """Base of every error that AReaLite raises on purpose."""


class ConfigError(ArealiteError):
    """The configuration is wrong: unknown key, wrong type, contradictory fields. Raised before anything starts."""


class DatasetError(ArealiteError):
    """A data set cannot be found, or a row lacks what the task needs; names the file and the row."""


class PromptError(ArealiteError):
    """Messages or a text that the tokenizer or its chat template refuses; whose they are is said by the caller."""


class RewardError(ArealiteError):
    """A reward function raised, returned something that is not a finite number, or passed its time limit."""


class RequestError(ArealiteError):
    """A server refused a request (HTTP 4xx): sending it again would not help."""


class ServerUnreachable(ArealiteError):
    """A server did not answer within the limit, after all retries."""


class WorkflowError(ArealiteError):
    """Episodes keep failing; carries the last traceback."""


class WeightSyncError(ArealiteError):
    """After a weight update a server does not hold the trainer's weights; names the tensor."""


class NumericalError(ArealiteError):
    """Loss or gradient was NaN or infinite too many times in a row."""


class WaitTimeout(ArealiteError):
    """A named wait passed its limit; the message is its line of the stall report."""


class RunStopped(ArealiteError):
    """Somebody asked the run to stop, by Ctrl-C or SIGTERM; raised where it can be gone on with."""


class RecoveryError(ArealiteError):
    """A recovery point is missing or incomplete, or the run folder belongs to another run."""


def listed(names: list[str]) -> str:
    """Some of them for a message, and how many there are beside."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
