"""Which parameters are reported together."""

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
        ScoringError: if a prefix covers no parameter.

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


def _by_depth(names: list[str], depth: int) -> Groups:
    return _collect((".".join(name.split(".")[:depth]), name) for name in names)


def _by_prefix(names: list[str], prefixes: Sequence[str]) -> Groups:
    def group(name: str) -> str:
        covering = (prefix for prefix in prefixes if name == prefix or name.startswith(f"{prefix}."))
        return max(covering, key=len, default=REST)

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
