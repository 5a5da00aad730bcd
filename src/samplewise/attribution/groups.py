"""Which parameters are reported together."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .task import ScoringError

Groups = dict[str, tuple[str, ...]]  # group -> names of its parameters

REST = "other"


def group_parameters(names: Iterable[str], *, depth: int | None = None, prefixes: Sequence[str] = ()) -> Groups:
    """Split parameter names into groups by module.

    Args:
        names: parameter names, such as `"encoder.0.weight"`.
        depth: number of leading name parts that make a group. Default: the smallest that gives at least two groups.
        prefixes: instead of a depth, module names; each is a group, and what none of them covers is the group "other".

    Returns:
        `{group: names}`, every name in exactly one group, in order of appearance.

    Raises:
        ScoringError: if a prefix covers no parameter, or is "other" and something is left for the group of that name.

    Example:
        >>> group_parameters(["conv.weight", "conv.bias", "head.weight"])
        {'conv': ('conv.weight', 'conv.bias'), 'head': ('head.weight',)}
    """
    names = list(names)
    if prefixes:
        return _by_prefix(names, prefixes)
    if depth is not None:
        return _by_depth(names, depth)
    deepest = max((name.count(".") + 1 for name in names), default=1)
    candidates = [_by_depth(names, depth) for depth in range(1, deepest + 1)]
    return next((groups for groups in candidates if len(groups) > 1), candidates[0])


def require_partition(groups: Groups, names: Sequence[str]) -> None:
    """Raise unless every name is in exactly one group: the norm over all parameters is made of the groups' norms."""
    given = Counter(name for members in groups.values() for name in members)
    problems = {
        "in no group": [name for name in names if name not in given],
        "in several": [name for name, times in given.items() if times > 1],
        "no trainable parameter": [name for name in given if name not in names],
    }
    found = [f"{', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} ({what})" for what, wrong in problems.items() if wrong]
    if found:
        raise ScoringError(
            f"parameter groups: every trainable parameter belongs in exactly one, not so for {'; '.join(found)}. "
            "group_parameters(names, prefixes=[...]) puts the rest in a group of its own."
        )


def _by_depth(names: list[str], depth: int) -> Groups:
    return _collect((".".join(name.split(".")[:depth]), name) for name in names)


def _by_prefix(names: list[str], prefixes: Sequence[str]) -> Groups:
    def group(name: str) -> str:
        covering = (prefix for prefix in prefixes if name == prefix or name.startswith(f"{prefix}."))
        return max(covering, key=len, default=REST)

    if REST in prefixes and any(group(name) == REST != name.split(".")[0] for name in names):
        raise ScoringError(f"parameter groups: '{REST}' is the group of what no prefix covers; name its parts, or give a depth")
    groups = _collect((group(name), name) for name in names)
    empty = [prefix for prefix in prefixes if prefix not in groups]
    if empty:
        known = ", ".join(_by_depth(names, 1))
        raise ScoringError(f"parameter groups: no trainable parameter lies under {', '.join(empty)}; the model has {known}")
    return groups


def _collect(pairs: Iterable[tuple[str, str]]) -> Groups:
    groups: dict[str, list[str]] = {}
    for group, name in pairs:
        groups.setdefault(group, []).append(name)
    return {group: tuple(members) for group, members in groups.items()}
