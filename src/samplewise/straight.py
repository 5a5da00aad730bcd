"""A graph of ops as one straight Python function: an assignment for each, and nothing kept longer than it is used."""

import keyword
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

# What is written into the source as it is.
_WRITTEN = (int, bool, str, type(None))


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The function of the graph's placeholders that runs its ops.

    Each op is called by its function in C: a call of Python's for each would be slow, and where the frames of a thread happen to end at
    the border of a block of memory, 20 us slow (CPython 3.11).
    """
    source = _Source()
    last = {used: node for node in graph.nodes for used in node.all_input_nodes}
    done = {node: [used for used, by in last.items() if by is node] for node in set(last.values())}
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            lines.append(f"{node.name} = {source.call(node)}")
            spent = [used.name for used in done.get(node, ())] + ([] if node in last else [node.name])
            lines += [f"{' = '.join(spent)} = None"] if spent else []
        elif node.op == "output":
            lines.append(f"return {source.value(node.args[0])}")
    given = ", ".join(node.name for node in graph.nodes if node.op == "placeholder")
    body = "\n    ".join(lines)
    exec(compile(f"def run({given}):\n    {body}\n", "<traced by samplewise>", "exec"), source.scope)  # noqa: S102  (of names and numbers)
    run: Callable[..., Any] = source.scope["run"]
    return run


class _Source:
    """Expressions, and the objects that they name."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def call(self, node: fx.Node) -> str:
        """A node's op with its arguments."""
        if node.target is operator.getitem:
            of, place = node.args
            return f"{self.value(of)}[{place}]"
        target: Any = node.target
        return f"{self._named(getattr(target, '_op', target), 'f')}({', '.join(self._arguments(node))})"

    def _arguments(self, node: fx.Node) -> Iterator[str]:
        yield from map(self.value, node.args)
        for name, value in node.kwargs.items():
            yield f"**{{{name!r}: {self.value(value)}}}" if keyword.iskeyword(name) else f"{name}={self.value(value)}"

    def value(self, value: Any) -> str:
        """Anything that an op takes."""
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self.value(item)}, ' for item in value)})"
        return repr(value) if type(value) in _WRITTEN else self._named(value, "c")

    def _named(self, value: Any, letter: str) -> str:
        if id(value) not in self._names:
            self._names[id(value)] = name = f"_{letter}{len(self._names)}"
            self.scope[name] = value
        return self._names[id(value)]
