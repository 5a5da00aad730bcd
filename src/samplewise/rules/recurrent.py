"""Recurrent layers: one product with the inputs of all steps, then a scan, or steps written out where a scan will not do.

Packed sequences are padded and masked, so that a sequence's state stands still after its end, and packed again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise import recurrence
from samplewise.axes import in_step
from samplewise.factors import Dense, positions
from samplewise.outer import Outer
from samplewise.registry import expand, rule
from samplewise.running import listed

States = tuple[Tensor, ...]
# (input product of one step, states, recurrent weights) -> states; the first state is the output
Cell = Callable[[Tensor, States, Sequence[Tensor | None]], States]

_OPS = torch._C._VariableFunctions  # noqa: SLF001


def _lstm_cell(x: Tensor, states: States, weights: Sequence[Tensor | None]) -> States:
    # i, f, g, o = x + W_hh h; c' = f c + i g; h' = W_hr (o tanh c')
    (h, c), (w_hh, b_hh, w_hr) = states, weights
    assert w_hh is not None
    i, f, g, o = (x + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _gru_cell(x: Tensor, states: States, weights: Sequence[Tensor | None]) -> States:
    # r, z from x + W_hh h; n = tanh(x_n + r (W_hn h)); h' = (1 - z) n + z h
    (h,), (w_hh, b_hh, _) = states, weights
    assert w_hh is not None
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (h - n),)


def _rnn_cell(activation: Callable[[Tensor], Tensor], x: Tensor, states: States, weights: Sequence[Tensor | None]) -> States:
    # h' = activation(x + W_hh h)
    (h,), (w_hh, b_hh, _) = states, weights
    assert w_hh is not None
    return (activation(x + F.linear(h, w_hh, b_hh)),)


_tanh_cell, _relu_cell = partial(_rnn_cell, torch.tanh), partial(_rnn_cell, torch.relu)
_SCANS: dict[Cell, recurrence.Cell] = {
    _lstm_cell: recurrence.LSTM,
    _gru_cell: recurrence.GRU,
    _tanh_cell: recurrence.plain("tanh"),
    _relu_cell: recurrence.plain("relu"),
}


@rule(recurrence.state_products, saves={"weight": ["h"], "bias": []})
def state_products(grad: Tensor, out: None, h: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, object]:
    # out[t,n,o] = sum_i h[t,n,i] weight[o,i] + bias[o], for the states before all steps
    g = positions(grad)
    return {"weight": lambda: Outer(g, positions(h), weight.shape), "bias": lambda: Dense(g.sum((1, 2)))}


def _direction(
    cell: Cell, x: Tensor, states: States, weights: Sequence[Tensor | None], mask: Tensor | None, *, backwards: bool
) -> tuple[Tensor, States]:
    """One layer in one direction over `x`, `(t, n, i)`; the outputs `(t, n, h)` and the last states."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    if recurrence.is_shared(x):
        # the first token of a decoder, whose states are an encoder's
        x = x + torch.zeros_like(states[0][..., :1], dtype=x.dtype)
    x = F.linear(x, w_ih, b_ih)
    # states given as constants begin to depend on the samples here, not at the first product with a weight
    states = tuple(h + torch.zeros_like(x[0][..., :1]) for h in states)
    if w_hr is None and recurrence.can_scan(x, states, (w_hh, b_hh)):
        return recurrence.scanned(_SCANS[cell], x, states, w_hh, b_hh, mask, backwards=backwards)
    steps = x.unbind(0)
    outs: list[Tensor] = []
    for t in reversed(range(len(steps))) if backwards else range(len(steps)):
        new = cell(steps[t], states, (w_hh, b_hh, w_hr))
        states = new if mask is None else tuple(torch.where(mask[t], a, b) for a, b in zip(new, states, strict=True))
        outs.append(states[0])
    return torch.stack(outs[::-1] if backwards else outs), states


def _layers(
    cell: Cell,
    x: Tensor,
    states: States,
    params: Sequence[Tensor],
    settings: tuple[bool, int, float, bool, bool],
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All layers and directions over `x`, `(t, n, i)`; states are `(layers * directions, n, h)`."""
    has_biases, num_layers, dropout, train, bidirectional = settings
    directions = 2 if bidirectional else 1
    chosen = _weights(params, num_layers * directions, has_biases)
    finals: list[States] = []
    for layer in range(num_layers):
        if layer and dropout and train:
            x = F.dropout(x, dropout)
        outs = []
        for k in range(layer * directions, (layer + 1) * directions):
            out, final = _direction(cell, x, tuple(s[k] for s in states), chosen[k], mask, backwards=k % directions == 1)
            outs.append(out)
            finals.append(final)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
    return (x, *(torch.stack(column) for column in zip(*finals, strict=True)))


def _weights(params: Sequence[Tensor], count: int, has_biases: bool) -> list[list[Tensor | None]]:
    """`[w_ih, w_hh, b_ih, b_hh, w_hr]` of each layer and direction, None where there is none."""
    each = len(params) // count
    chosen: list[list[Tensor | None]] = []
    for k in range(count):
        own: list[Tensor | None] = list(params[k * each : (k + 1) * each])
        biases = own[2:4] if has_biases else [None, None]
        projection = own[-1] if each == (5 if has_biases else 3) else None
        chosen.append([*own[:2], *biases, projection])
    return chosen


def _padded(
    cell: Cell,
    input: Tensor,
    states: States,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    x = input.transpose(0, 1) if batch_first else input
    out, *finals = _layers(cell, x, states, params, (has_biases, num_layers, dropout, train, bidirectional))
    return (out.transpose(0, 1) if batch_first else out, *finals)


def _packed(
    cell: Cell,
    data: Tensor,
    batch_sizes: Tensor,
    states: States,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    with in_step():
        x, mask = _unpacked(data, batch_sizes)
        settings = (has_biases, num_layers, dropout, train, bidirectional)
        out, *finals = _layers(cell, x, states, params, settings, mask)
        return (out.flatten(0, 1).index_select(0, _rows(batch_sizes, data.device)), *finals)


def _rows(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """Where the packed rows stand among the `t * n` padded ones."""
    sizes = listed(batch_sizes)
    return torch.tensor(
        [t * sizes[0] + i for t, size in enumerate(sizes) for i in range(size)], dtype=torch.long, device=device
    )


def _unpacked(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The packed rows as `(t, n, ...)`, with `(t, n, 1)` true where a sequence has not ended."""
    sizes = listed(batch_sizes)
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    # past its end a sequence shows its first row, which the mask hides
    source = [starts[t] + i if i < size else i for t, size in enumerate(sizes) for i in range(sizes[0])]
    mask = [[[i < size] for i in range(sizes[0])] for size in sizes]
    picked = data.index_select(0, torch.tensor(source, dtype=torch.long, device=data.device))
    return picked.reshape(len(sizes), sizes[0], *data.shape[1:]), torch.tensor(mask, device=data.device)


def _run(
    op: Callable[..., tuple[Tensor, ...]],
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor | Sequence[Tensor],
    settings: Sequence[object],
) -> tuple[Tensor, ...]:
    """The op from its cell, on rows that are packed if it is given `batch_sizes`."""
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    given = (input,) if batch_sizes is None else (input, batch_sizes)
    form: Callable[..., tuple[Tensor, ...]] = _padded if batch_sizes is None else _packed
    results = form(cell, *given, states, *settings)
    if not torch.is_autocast_enabled(input.device.type) or not input.numel():
        return results
    # autocast has some of them compute in the shorter type throughout: which, one step of one sample tells
    with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
        first = hx[:, :1] if isinstance(hx, Tensor) else tuple(h[:, :1] for h in hx)
        fed = (input[:1, :1],) if batch_sizes is None else (input[:1], torch.ones_like(batch_sizes[:1]))
        params, has_biases, num_layers, _, *others = settings
        told = op(*fed, first, params, has_biases, num_layers, 0.0, *others)
    return tuple(x.to(y.dtype) for x, y in zip(results, told, strict=True))


@expand(_OPS.lstm)
def lstm(input: Tensor, second: Tensor | Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    # lstm(input, hx, params, ...) or, packed, lstm(data, batch_sizes, hx, params, ...)
    if isinstance(second, Tensor):
        return _run(_OPS.lstm, _lstm_cell, input, second, rest[0], rest[1:])
    return _run(_OPS.lstm, _lstm_cell, input, None, second, rest)


def _single_state(
    op: Callable[..., tuple[Tensor, ...]],
    cell: Cell,
    input: Tensor,
    second: Tensor,
    third: Tensor | Sequence[Tensor],
    *rest: object,
) -> tuple[Tensor, ...]:
    # op(input, hx, params, ...) or, packed, op(data, batch_sizes, hx, params, ...)
    if isinstance(third, Tensor):
        return _run(op, cell, input, second, third, rest)
    return _run(op, cell, input, None, second, (third, *rest))


for _op, _cell in ((_OPS.gru, _gru_cell), (_OPS.rnn_tanh, _tanh_cell), (_OPS.rnn_relu, _relu_cell)):
    expand(_op)(partial(_single_state, _op, _cell))


@expand(_OPS._pack_padded_sequence)  # noqa: SLF001
def pack_padded_sequence(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    counts = listed(lengths)
    if counts != sorted(counts, reverse=True) or min(counts, default=1) < 1:
        raise RuntimeError(
            f"pack_padded_sequence: expected positive lengths in decreasing order, got {counts}. Pass enforce_sorted=False."
        )
    batch_sizes = torch.tensor(
        [sum(t < count for count in counts) for t in range(max(counts, default=0))], dtype=torch.long, device="cpu"
    )
    steps = input.transpose(0, 1) if batch_first else input
    with in_step():
        return steps.flatten(0, 1).index_select(0, _rows(batch_sizes, input.device)), batch_sizes


@expand(_OPS._pad_packed_sequence)  # noqa: SLF001
def pad_packed_sequence(
    input: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    with in_step():
        picked, mask = _unpacked(input, batch_sizes)
        padded = torch.where(mask.reshape(*mask.shape[:2], *[1] * (picked.ndim - 2)).to(input.device), picked, padding_value)
    if total_length > len(padded):
        padded = F.pad(padded, [*[0] * (2 * padded.ndim - 1), total_length - len(padded)], value=padding_value)
    return padded.transpose(0, 1) if batch_first else padded, mask.sum(0)[:, 0]


@expand(_OPS.lstm_cell)
def lstm_cell(input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    x = F.linear(input, w_ih, biases[0] if biases else None)
    states = tuple(h + torch.zeros_like(x[..., :1]) for h in hx)
    return _lstm_cell(x, states, (w_hh, biases[1] if biases else None, None))


def _single_cell(cell: Cell, input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> Tensor:
    x = F.linear(input, w_ih, biases[0] if biases else None)
    return cell(x, (hx + torch.zeros_like(x[..., :1]),), (w_hh, biases[1] if biases else None, None))[0]


expand(_OPS.gru_cell)(partial(_single_cell, _gru_cell))
expand(_OPS.rnn_tanh_cell)(partial(_single_cell, _tanh_cell))
expand(_OPS.rnn_relu_cell)(partial(_single_cell, _relu_cell))
