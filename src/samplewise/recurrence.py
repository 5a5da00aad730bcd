"""A recurrent layer as three recorded ops: the steps, the product of all states with the recurrent weights, and the scan.

The steps run first, without a graph, and leave every state behind. Then the product of all states is *said* to the recording, which takes
its gradients as those of any linear layer, in one product over samples and steps. The scan ties the products to the states by a backward
of its own, so that no step has a node in the autograd graph. Tensors of all steps are `(t, n, ...)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .products import RepeatedProduct
from .registry import opaque
from .running import modes, unrecorded

# Everything that the steps leave behind for the backward, the states h `(t + 1, n, h)` first.
Memory = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """The steps of one kind of layer, all forwards and all backwards."""

    # (input products, states, recurrent weights, recurrent bias, mask, order) -> memory
    run: Callable[[Tensor, Sequence[Tensor], Tensor, Tensor | None, Tensor | None, "Order"], Memory]
    # (memory, recurrent weights, gradients of h `(t, n, h)` and of the last c, mask, order) -> gradients of the input products, of
    # the state products, and of the first states
    back: Callable[[Memory, Tensor, Tensor, Tensor | None, Tensor | None, "Order"], tuple[Tensor, Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Order:
    """From the first step to the last, or the other way."""

    length: int
    backwards: bool

    def steps(self) -> list[tuple[int, int, int]]:
        """(step, place of the state before it, place of the state after it), in the order of time."""
        if self.backwards:
            return [(k, k + 1, k) for k in reversed(range(self.length))]
        return [(k, k, k + 1) for k in range(self.length)]

    @property
    def last(self) -> int:
        """The place of the last step among those of all steps."""
        return 0 if self.backwards else -1

    def back(self) -> list[tuple[int, int | None]]:
        """(step, the one before it), from the last to the first."""
        steps = [k for k, *_ in reversed(self.steps())]
        return list(zip(steps, [*steps[1:], None], strict=True))

    def before(self, states: Tensor) -> Tensor:
        """The state before each step, of `(t + 1, ...)` states."""
        return states[1:] if self.backwards else states[:-1]

    def after(self, states: Tensor) -> Tensor:
        """The state after each step."""
        return states[:-1] if self.backwards else states[1:]

    def begun(self, state: Tensor) -> Tensor:
        """Memory for all states, `(t + 1, n, h)`, with the first one in its place."""
        states = state.new_empty(self.length + 1, *state.shape)
        states[self.length if self.backwards else 0] = state
        return states


def is_shared(x: Tensor) -> bool:
    """Whether a tensor is the same for all samples, as a recording knows it."""
    return any(mode.where(x) is None for mode in modes() if hasattr(mode, "where"))


def can_scan(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None]) -> bool:
    """Whether the scan's own backward will do: one real type, and no derivative of it."""
    types = {tensor.dtype for tensor in (x, *states, *weights) if tensor is not None}
    again = any(getattr(mode, "create_graph", False) for mode in modes())
    return len(types) == 1 and x.is_floating_point() and not again


def scanned(
    cell: Cell, x: Tensor, states: Sequence[Tensor], w: Tensor, b: Tensor | None, mask: Tensor | None, *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction from the products with its inputs `(t, n, gates h)`: h of all steps, and the last states."""
    order, fixed = Order(len(x), backwards), w.detach()
    mask = None if mask is None else mask.to(x.dtype)
    memory = steps(cell, x.detach(), [h.detach() for h in states], fixed, None if b is None else b.detach(), mask, order)
    products = state_products(order.before(memory[0]), w, b)
    out, *others = scan(cell, x, products, tuple(states), fixed, memory, mask, order)
    return out, (out[order.last], *others)


@opaque
def steps(
    cell: Cell, x: Tensor, states: Sequence[Tensor], w: Tensor, b: Tensor | None, mask: Tensor | None, order: Order
) -> Memory:
    """Run all steps, without a graph."""
    if has_torch_function((x,)):
        return handle_torch_function(steps, (x,), cell, x, states, w, b, mask, order)
    with torch.no_grad():
        return cell.run(x, states, w, b, mask, order)


def state_products(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear(h, weight, bias)`, whose values the scan knows: memory of the right shape, unless autograd itself is to see it."""
    if has_torch_function((h, weight)):
        return handle_torch_function(state_products, (h, weight), h, weight, bias)
    if any(tensor is not None and tensor.requires_grad for tensor in (weight, bias)):
        return F.linear(h, weight, bias)
    return h.new_empty(*h.shape[:-1], len(weight))


@opaque
def scan(
    cell: Cell,
    x: Tensor,
    products: Tensor,
    states: Sequence[Tensor],
    w: Tensor,
    memory: Memory,
    mask: Tensor | None,
    order: Order,
) -> tuple[Tensor, ...]:
    """The h of all steps `(t, n, h)`, and the last c of an LSTM, with the backward through all steps."""
    if has_torch_function((x, products)):
        return handle_torch_function(scan, (x, products), cell, x, products, states, w, memory, mask, order)
    outs: tuple[Tensor, ...] = _Scan.apply(cell, order, mask, len(states), x, products, w, *states, *memory)  # type: ignore[no-untyped-call]
    return outs


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, order: Order, mask: Tensor | None, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        _, _, w, *rest = tensors
        memory = rest[count:]
        ctx.save_for_backward(w, *(() if mask is None else (mask,)), *memory)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.order, ctx.masked, ctx.count = cell, order, mask is not None, count
        # copies: the user may change them in place
        return order.after(memory[0]).clone(), *(c[order.last].clone() for c in memory[1:count])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_h: Tensor | None, d_c: Tensor | None = None) -> tuple[Any, ...]:
        w, *memory = ctx.saved_tensors
        mask = memory.pop(0) if ctx.masked else None
        # the recording is active in the backward too, for checkpoints
        with unrecorded():
            d_h = torch.zeros_like(ctx.order.after(memory[0])) if d_h is None else d_h.contiguous()
            d_x, d_products, d_states = ctx.cell.back(memory, w, d_h, d_c, mask, ctx.order)
        return None, None, None, None, d_x, d_products, None, *d_states, *[None] * len(memory)


# --- LSTM: i, f, g, o = x + W h; c' = f c + i g; h' = o tanh c' -----------------------------------------------------------------


def _run_lstm(x: Tensor, states: Sequence[Tensor], w: Tensor, b: Tensor | None, mask: Tensor | None, order: Order) -> Memory:
    hs, cs = (order.begun(state) for state in states)
    size = w.shape[1]
    gates, tanh_cs = torch.empty_like(x), torch.empty_like(order.after(cs))
    h, c, tanh_c, product = hs.unbind(), cs.unbind(), tanh_cs.unbind(), RepeatedProduct(w, len(hs[0]), b)
    inputs, all_gates = x.unbind(), gates.unbind()
    i, f, g, o = (gates[..., k * size : (k + 1) * size].unbind() for k in range(4))
    for k, before, after in order.steps():
        total = product.plus(h[before], inputs[k])
        # of all four at once, and then the candidate again
        torch.sigmoid(total, out=all_gates[k])
        torch.tanh(total[:, 2 * size : 3 * size], out=g[k])
        torch.mul(f[k], c[before], out=c[after]).addcmul_(i[k], g[k])
        _stand_still(c, k, before, after, mask)
        torch.tanh(c[after], out=tanh_c[k])
        torch.mul(o[k], tanh_c[k], out=h[after])
        _stand_still(h, k, before, after, mask)
    return hs, cs, gates, tanh_cs


def _back_lstm(
    memory: Memory, w: Tensor, d_hs: Tensor, d_c: Tensor | None, mask: Tensor | None, order: Order
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, cs, gates, tanh_c = memory
    aten = torch.ops.aten
    i, f, g, o = gates.unflatten(-1, (4, -1)).unbind(2)
    # derivatives of c by the first three gates, of h by the last, and of h by c: those of all steps at once
    inner = [aten.sigmoid_backward(g, i), aten.sigmoid_backward(order.before(cs), f), aten.tanh_backward(i, g)]
    slopes, through, keep = torch.stack([*inner, aten.sigmoid_backward(tanh_c, o)], 2), aten.tanh_backward(o, tanh_c), f
    if mask is not None:
        slopes, through, keep = slopes * mask[..., None], through * mask, torch.lerp(torch.ones_like(f), f, mask)
    d_gates = torch.empty_like(gates)
    by_gate = d_gates.view_as(slopes)
    first, first_slopes, last, last_slopes = by_gate[:, :, :3], slopes[:, :, :3], by_gate[:, :, 3], slopes[:, :, 3]
    d_c = torch.zeros_like(tanh_c[0]) if d_c is None else d_c.clone()
    d_h, product = d_hs[order.last], RepeatedProduct(w.t(), len(d_c))
    for k, earlier in order.back():
        d_c.addcmul_(d_h, through[k])
        torch.mul(first_slopes[k], d_c[:, None], out=first[k])
        torch.mul(last_slopes[k], d_h, out=last[k])
        d_c.mul_(keep[k])
        d_h = _earlier(product, d_gates[k], d_hs, earlier, d_h, k, mask)
    return d_gates, d_gates, [d_h, d_c]


# --- GRU: r, z = x + W h; n = tanh(x_n + r (W_n h)); h' = (1 - z) n + z h -------------------------------------------------------


def _run_gru(x: Tensor, states: Sequence[Tensor], w: Tensor, b: Tensor | None, mask: Tensor | None, order: Order) -> Memory:
    hs, size, product = order.begun(states[0]), w.shape[1], RepeatedProduct(w, len(states[0]), b)
    gates, products = torch.empty_like(x), torch.empty_like(x)
    h, whole = hs.unbind(), products.unbind()
    (x_rz, x_n), (p_rz, p_n), (rz, n) = (
        (part[..., : 2 * size].unbind(), part[..., 2 * size :].unbind()) for part in (x, products, gates)
    )
    r, z = (gates[..., k * size : (k + 1) * size].unbind() for k in (0, 1))
    for k, before, after in order.steps():
        whole[k].copy_(product.of(h[before]))
        torch.add(x_rz[k], p_rz[k], out=rz[k]).sigmoid_()
        torch.addcmul(x_n[k], r[k], p_n[k], out=n[k]).tanh_()
        torch.lerp(n[k], h[before], z[k], out=h[after])
        _stand_still(h, k, before, after, mask)
    return hs, gates, products[..., 2 * size :]


def _back_gru(
    memory: Memory, w: Tensor, d_hs: Tensor, _: Tensor | None, mask: Tensor | None, order: Order
) -> tuple[Tensor, Tensor, list[Tensor]]:
    hs, gates, product_n = memory
    aten = torch.ops.aten
    r, z, n = gates.unflatten(-1, (3, -1)).unbind(2)
    by_n = aten.tanh_backward(1 - z, n)
    slopes = torch.stack([aten.sigmoid_backward(by_n * product_n, r), aten.sigmoid_backward(order.before(hs) - n, z), by_n], 2)
    one = torch.ones_like(r)
    return _back_simple(slopes, torch.stack([one, one, r], 2), z, w, d_hs, mask, order)


# --- plain: h' = activation(x + W h) --------------------------------------------------------------------------------------------


def _run_plain(
    activation: Callable[[Tensor], Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    w: Tensor,
    b: Tensor | None,
    mask: Tensor | None,
    order: Order,
) -> Memory:
    hs, product = order.begun(states[0]), RepeatedProduct(w, len(states[0]), b)
    h = hs.unbind()
    for k, before, after in order.steps():
        activation(h[after].copy_(product.plus(h[before], x[k])))
        _stand_still(h, k, before, after, mask)
    return (hs,)


def _back_plain(
    slope: Callable[[Tensor], Tensor],
    memory: Memory,
    w: Tensor,
    d_hs: Tensor,
    _: Tensor | None,
    mask: Tensor | None,
    order: Order,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _back_simple(slope(order.after(memory[0]))[:, :, None], None, None, w, d_hs, mask, order)


def _back_simple(
    slopes: Tensor,
    recurrent: Tensor | None,
    keep: Tensor | None,
    w: Tensor,
    d_hs: Tensor,
    mask: Tensor | None,
    order: Order,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Without c: `slopes` are those of h by the input products, `(t, n, gates, h)`, times `recurrent` by the state products."""
    if mask is not None:
        slopes, keep = slopes * mask[..., None], None if keep is None else keep * mask
    d_x = torch.empty_like(slopes)
    d_products = d_x if recurrent is None else torch.empty_like(slopes)
    d_h, flat, product = d_hs[order.last], d_products.flatten(2), RepeatedProduct(w.t(), slopes.shape[1])
    for k, earlier in order.back():
        torch.mul(slopes[k], d_h[:, None], out=d_x[k])
        if recurrent is not None:
            torch.mul(d_x[k], recurrent[k], out=d_products[k])
        found = _earlier(product, flat[k], d_hs, earlier, d_h, k, mask)
        d_h = found if keep is None else found.addcmul_(d_h, keep[k])
    return d_x.flatten(2), flat, [d_h]


def _stand_still(states: Sequence[Tensor], k: int, before: int, after: int, mask: Tensor | None) -> None:
    """Past its end a sequence keeps its state."""
    if mask is not None:
        torch.lerp(states[before], states[after], mask[k].expand_as(states[after]), out=states[after])


def _earlier(
    product: RepeatedProduct, d_product: Tensor, d_hs: Tensor, earlier: int | None, d_h: Tensor, k: int, mask: Tensor | None
) -> Tensor:
    """The gradient of the state before step k: its own, and through its product with the weights or standing still."""
    d_state = product.of(d_product) if earlier is None else product.plus(d_product, d_hs[earlier])
    return d_state if mask is None else d_state.addcmul_(d_h, 1 - mask[k])


LSTM = Cell(_run_lstm, _back_lstm)
GRU = Cell(_run_gru, _back_gru)


def plain(activation: str) -> Cell:
    """A layer without gates; `activation` is "tanh" or "relu"."""
    in_place, slope = {
        "tanh": (torch.tanh_, lambda h: 1 - h.square()),
        "relu": (torch.relu_, lambda h: (h > 0).to(h.dtype)),
    }[activation]
    return Cell(lambda *args: _run_plain(in_place, *args), lambda *args: _back_plain(slope, *args))
