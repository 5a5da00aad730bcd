"""Every error of the library. Each message names the call, the parameter, what was expected, what was found, what to do."""


class SamplewiseError(RuntimeError):
    """Base of all errors raised by samplewise."""


class SampleAxisError(SamplewiseError):
    """The axis that carries the samples is lost, ambiguous or unknown where it is needed."""


class MixedSamplesError(SamplewiseError):
    """An operation lets one sample's value depend on another sample: no per-sample gradient exists."""


class UnsupportedOpError(SamplewiseError):
    """An operation on a parameter can be given to samples neither by a rule nor by the fallback."""


class VerificationError(SamplewiseError):
    """`verify` found a difference from the batch-of-one loop."""


def one_of(name: str, value: str, *choices: str) -> None:
    """Refuse an argument of `record` that is none of the words it may be."""
    if value not in choices:
        raise ValueError(f"record: {name} is one of {', '.join(map(repr, choices))}, got {value!r}")


def of_type(call: str, value: object, expected: str, *kinds: type) -> None:
    """Refuse an argument of another type."""
    if not isinstance(value, kinds):
        raise TypeError(f"{call}: expected {expected}, got a {type(value).__name__}")
