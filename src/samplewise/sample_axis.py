"""Where the sample axis goes: tables that name the ops of each family in `movement` and `alignment`.

An op that is in no table loses the axis; losing is always safe, because a parameter that meets a lost axis raises.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .alignment import (
    Several,
    batch_dims,
    broadcast,
    broadcast_along,
    class_loss,
    concatenated,
    contraction,
    convolved,
    ctc,
    distances,
    elementwise_loss,
    first_of_all,
    indexed,
    looked_up,
    margin_loss,
    searched,
    selected,
    similarity,
    solved,
    stacked,
    stepwise,
)
from .axes import Axis, Call, Lost, Where, in_step_now, whole
from .beside import (
    Beside,
    by_class,
    by_letter,
    by_spelled_letter,
    everywhere_first,
    from_the_right,
    in_groups,
    in_steps,
    joined,
    mixed_by_place,
    nothing,
    of_a_rule,
    of_margins,
    of_pairs,
    of_points,
    of_sequences,
    of_systems,
)
from .by_example import moved, reshaped_alike
from .contractions import CONTRACTIONS
from .errors import MixedSamplesError
from .movement import (
    Single,
    after_channels,
    all_but,
    along,
    before_last,
    diagonal,
    dims_moved,
    expanded,
    first_only,
    flipped,
    last_diagonal,
    normalized_dims,
    padded,
    permuted,
    quantiles,
    reduced,
    removed,
    repeated_each,
    reshaped,
    reversed_dims,
    squeezed,
    swapped,
    tiled,
    turned,
    unsqueezed,
)
from .ownership import along_dim, gathered, masked_put, occurring, of_lost_view, picked, put, scattered
from .registry import RULES
from .running import listed


def follow(call: Call, out: Tensor) -> Where | None:
    """Where the sample axis of one result of `call` is; None where no argument carries it."""
    unowned = call.forget_nobodys()
    where = of_lost_view(call, _in_order(call, _follow(call, out)))
    return where or (Axis.of_nobody(out) if unowned or call.placed() else None)


def _in_order(call: Call, where: Where | None) -> Where | None:
    """Lost where rows that the data chose meet others by their place; what is known of them stays known."""
    own, chosen = next(((axis, axis.chosen) for _, axis in call.placed() if axis.chosen), (None, None))
    if own is None or chosen is None or call.n <= 1 or in_step_now() or call.sample() is not None:
        return where
    name = call.name.removeprefix("special_")
    if name in SINGLE or name in TAKES or (name in EXAMPLES and name not in SEVERAL):
        return where
    if isinstance(where, Lost) and not where.linear:
        return where
    if mixed_by_place(call, BESIDE.get(name, of_a_rule)):
        return Lost(call.name)
    if not isinstance(where, Axis) or where.chosen is not None:
        return where
    return replace(where, chosen=chosen if where.size(call.n) == own.size(call.n) else chosen.moved())


def _follow(call: Call, out: Tensor) -> Where | None:
    lost = [where for x in call.tensors if isinstance(where := call.where(x), Lost)]
    if lost and not _lost_places_only(call):
        return _entry(call, lost, out) if call.name in ENTRIES else _still_lost(call, lost, out)
    if not call.placed():
        return None
    if call.n <= 1:
        return whole(out)
    sample = None if lost else call.sample()
    # rows that are moved to a place of their own leave the others to nobody
    if sample is not None and call.name not in {*EXAMPLES, *WRITES} and not any(axis.chosen for _, axis in call.placed()):
        return Axis.of_sample(sample, out)
    where = _move(call, out)
    if isinstance(where, Lost) and call.name in EXAMPLES and not lost:
        where = EXAMPLES[call.name](call, out)
    if isinstance(where, Lost) and sample is not None:
        return Axis.of_sample(sample, out)
    if isinstance(where, Lost) and where.linear and call.name != "sum":
        # a mean over picked or packed rows is none over samples
        return Lost(where.op, where.linear, where.uniform and all(axis.ragged is None for _, axis in call.placed()))
    if where is None:
        return None
    # a constant that broadcasts over the rows, and the like
    shape = tuple(out.shape) if out.ndim else (1,)
    fits = isinstance(where, Lost) or shape[where.dim : where.dim + 1] == (where.size(call.n),)
    return where if fits else Lost(call.name)


def _lost_places_only(call: Call) -> bool:
    """Whether an op picks or writes rows of known samples, at places that the whole batch decided."""
    if call.name in INDEXING:
        return isinstance(call.where(call.args[0]), Axis)
    return call.name in WRITES and not any(
        x.is_floating_point() or x.dtype == torch.bool for x in call.tensors if isinstance(call.where(x), Lost)
    )


def _entry(call: Call, lost: list[Lost], out: Tensor) -> Where | None:
    """One entry of a list of what occurs in the batch is like a Python number: constant."""
    if not all(item.listed for item in lost):
        return _still_lost(call, lost, out)
    return None if out.numel() == 1 else Lost(lost[0].op, listed=True)


def refuse_mixing(call: Call) -> None:
    """Raise for an op that mixes the samples of its operands, before it has run and changed anything.

    Raises:
        MixedSamplesError: Naming the op and the remedy.
    """
    if call.name in MIXING and call.placed():
        MIXING[call.name](call)


def _move(call: Call, out: Tensor) -> Where | None:
    name = call.name.removeprefix("special_")
    x, axis = call.placed()[0]
    if name == "linear" and len(call.placed()) == 1 and x is call.tensors[0] and axis.dim < x.ndim - 1:
        return axis
    if name in CONTRACTIONS:
        return contraction(call, out)
    if name in SEVERAL:
        return SEVERAL[name](call, out)
    if name in SINGLE and name not in _TAKES_NO_AXIS and any(_is_number(y) for y in call.tensors if call.where(y) is None):
        # an axis, given as a tensor
        return Lost(call.name)
    if name in SINGLE and x is call.tensors[0] and len(call.placed()) == 1:
        where = SINGLE[name](call, x, axis, out)
        return _sorted(call, x, out) if isinstance(where, Lost) and name in {"sort", "argsort"} else where
    if name not in {*SINGLE, *SEVERAL} and name in RULES and all(axis.dim == 0 for _, axis in call.placed()):
        # a rule of a third party, whose op has its samples on axis 0
        return axis
    return Lost(call.name, listed=name in LISTS)


def _sorted(call: Call, x: Tensor, out: Tensor) -> Lost:
    """What a sort over the samples gives; of the order of rows by an integer of each (its expert), the integers in that order."""
    places = call.name == "argsort" or (len(call.results) == 2 and call.results[1] is out)
    whole = x.ndim == 1 and not x.is_floating_point() and x.dtype != torch.bool
    return Lost(call.name, order=object() if places else None, keys=tuple(listed(x[out])) if places and whole else None)


def _is_number(x: Tensor) -> bool:
    return x.ndim == 0 and not x.is_floating_point() and not x.is_complex()


def _still_lost(call: Call, lost: list[Lost], out: Tensor) -> Lost:
    """What arithmetic on a total leaves: sums and scalings stay linear in the samples, anything else does not."""
    carrying = [x for x in call.tensors if x.requires_grad]
    wheres = [call.where(x) for x in carrying]
    if call.name in LISTS or (call.name == "where" and len(call.args) + len(call.kwargs) == 1):
        return Lost(lost[0].op, listed=True)
    uniform = all(item.uniform for item in lost)
    linear = all(isinstance(where, Lost) and where.linear for where in wheres) and call.name in LINEAR
    if call.name in {"mul", "multiply"}:
        # a mask or weights made of the batch
        others = [x for x in call.tensors if not x.requires_grad and call.where(x)]
        linear, uniform = linear and len(carrying) <= 1 and all(x.numel() == 1 for x in others), uniform and not others
    if call.name in {"div", "divide", "true_divide"}:
        linear = linear and not any(call.get(1, "other") is x for x in carrying)
        # the sum of losses by the sum of a mask: how much a sample weighs depends on the others
        uniform = uniform and not isinstance(call.get(1, "other"), Tensor)
    op = call.name if call.name in {*WRITES, "gather", "take_along_dim", "masked_scatter"} else lost[0].op
    refused = next((item.refused for item in lost if item.refused), None)
    # numbers of rows in the order of a sort stay in that order under arithmetic, and when looked up in a constant
    kept = call.name in KEEPS_ROWS
    keys = lost[0].keys if kept and lost[0].keys is not None and out.shape == (len(lost[0].keys),) else None
    return Lost(op, linear, uniform, refused=refused, order=lost[0].order if kept else None, keys=keys)


# --- ops that mix samples -----------------------------------------------------------------------------------------------------


def _batch_norm(call: Call) -> None:
    # the sixth argument of torch.batch_norm
    if call.get(5, "training"):
        raise MixedSamplesError(
            "batch_norm: in training mode its statistics mix the samples of a batch, so no per-sample gradient exists. "
            "Call `model.eval()` to use the running statistics, or replace the layer by nn.GroupNorm or nn.LayerNorm."
        )


def _renormalised(_: Call) -> None:
    raise MixedSamplesError(
        "embedding: max_norm rescales rows of the weight in the forward pass, by the ids of the whole batch. "
        "Normalise the weight before the step (or in a parametrization) and leave max_norm unset."
    )


MIXING: dict[str, Callable[[Call], None]] = {"batch_norm": _batch_norm, "embedding_renorm": _renormalised}

# --- the tables ---------------------------------------------------------------------------------------------------------------

ELEMENTWISE = """
mvlgamma frexp
abs absolute acos acosh add addcdiv addcmul airy_ai alias alpha_dropout and angle arccos arccosh arcsin arcsinh arctan arctan2
arctanh asin asinh atan atan2 atanh bernoulli bessel_j0 bessel_j1 bessel_y0 bessel_y1 bfloat16 bitwise_and bitwise_left_shift
bitwise_not bitwise_or bitwise_right_shift bitwise_xor bool bucketize byte cdouble ceil celu cfloat chalf char clamp clamp_max
clamp_min clip clone complex conj conj_physical contiguous copy copysign cos cosh cpu cuda data deg2rad detach digamma div divide
double dropout elu empty_like entr eq erf erfc erfcx erfinv exp exp2 expit expm1 exponential fake_quantize_per_tensor_affine
feature_alpha_dropout feature_dropout
fill fix float float_power floor floor_divide floordiv fmax fmin fmod frac full_like gammainc gammaincc gammaln gcd ge gelu
greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 i0e i1 i1e iand igamma igammac imag int
invert ior isclose isfinite isinf isnan isneginf isposinf isreal ixor lcm ldexp le leaky_relu lerp less less_equal lgamma log
log10 log1p log2 log_ndtr log_normal log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit
logsigmoid long lshift lt masked_fill maximum minimum mish mul multiply nan_to_num ndtr ndtri ne neg negative new_tensor nextafter normal
not_equal ones_like or pin_memory polar polygamma positive pow rad2deg rand_like randint_like randn_like random real reciprocal
relu relu6 remainder requires_grad resolve_conj resolve_neg round rrelu rrelu_with_noise rshift rsqrt rsub selu sgn short sigmoid
sign signbit silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold to true_divide
trunc type type_as uniform wait_tensor where xlog1py xlogy xor zero zeros_like zeta
""".split()

LINEAR = frozenset(
    """add sub subtract rsub neg negative positive mul multiply div divide true_divide sum mean view reshape squeeze unsqueeze flatten
    stack cat concat clone contiguous to float double half bfloat16 type expand view_as alias getitem data copy""".split()
)

# Elementwise losses, with the position of their reduction code.
LOSSES = {
    **dict.fromkeys(["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div"], 2),
    "binary_cross_entropy": 3,
    "binary_cross_entropy_with_logits": 4,
    "poisson_nll_loss": 5,
}

SEVERAL: dict[str, Several] = {
    **dict.fromkeys(ELEMENTWISE, broadcast),
    **dict.fromkeys(["cat", "concat", "concatenate"], concatenated),
    "stack": stacked,
    "where": lambda call, out: broadcast(call, out) if len(call.args) + len(call.kwargs) > 1 else occurring(call, out),
    "embedding": looked_up,
    **dict.fromkeys(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d"], first_of_all),
    **{f"conv{d}d": convolved(d, groups=6) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": convolved(d, groups=6) for d in (1, 2, 3)},
    "ctc_loss": ctc,
    **dict.fromkeys(["max_unpool2d", "max_unpool3d"], first_of_all),
    **dict.fromkeys(["linalg_solve", "linalg_solve_ex"], solved),
    **dict.fromkeys(["linalg_solve_triangular", "triangular_solve", "cholesky_solve"], batch_dims),
    **dict.fromkeys(["multi_margin_loss", "multilabel_margin_loss"], margin_loss),
    "triplet_margin_loss": elementwise_loss(7, gone=-1),
    "masked_select": picked,
    "getitem": indexed,
    "index_select": selected,
    "scaled_dot_product_attention": batch_dims,
    "cdist": distances,
    "searchsorted": searched,
    **dict.fromkeys(["gather", "take_along_dim"], gathered),
    **dict.fromkeys(["scatter", "scatter_add", "scatter_reduce"], scattered),
    **dict.fromkeys(["index_add", "index_copy", "index_reduce", "index_fill"], along_dim),
    "index_put": put,
    "masked_scatter": masked_put,
    **dict.fromkeys(["nonzero", "argwhere"], occurring),
    # without `dim`, torch.cross takes the first axis of size 3, whichever that is
    "cross": broadcast_along(2),
    "linalg_cross": broadcast_along(2, -1),
    **dict.fromkeys(["cosine_similarity", "pairwise_distance"], similarity),
    **dict.fromkeys(["cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d"], class_loss),
    **{name: elementwise_loss(place) for name, place in LOSSES.items()},
    "hinge_embedding_loss": elementwise_loss(3),
    **{f"samplewise.recurrence.{name}": stepwise for name in ("steps", "state_products", "scan")},
    "margin_ranking_loss": elementwise_loss(4),
    "cosine_embedding_loss": elementwise_loss(4, gone=1),
}

SINGLE: dict[str, Single] = {
    **dict.fromkeys(
        "view reshape flatten unflatten ravel view_as reshape_as unsafe_view".split(),
        reshaped,
    ),
    "permute": permuted,
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], swapped),
    **dict.fromkeys(["t", "mT", "mH", "adjoint"], turned),
    **dict.fromkeys(["T", "H"], reversed_dims),
    **dict.fromkeys(["movedim", "moveaxis"], dims_moved),
    "squeeze": squeezed,
    "unsqueeze": unsqueezed,
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], expanded),
    **dict.fromkeys(["repeat", "tile"], tiled),
    "repeat_interleave": repeated_each,
    **dict.fromkeys(
        """sum mean prod amax amin any all argmax argmin logsumexp nansum nanmean var std var_mean std_mean count_nonzero median
        nanmedian max min aminmax""".split(),
        reduced(),
    ),
    **dict.fromkeys(["linalg_vector_norm", "norm"], reduced(2)),
    "kthvalue": reduced(2, -1),
    "mode": reduced(1, -1),
    **dict.fromkeys(["quantile", "nanquantile"], quantiles),
    **dict.fromkeys(
        ["softmax", "log_softmax", "safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"], along()
    ),
    **dict.fromkeys(["sort", "argsort", "glu"], along(1, -1)),
    "msort": along(99, 0),
    **dict.fromkeys(["topk", "diff"], along(2, -1)),
    "roll": along(2),
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"], along(2, 0)),
    **dict.fromkeys(["narrow", "unfold"], along(1)),
    "slice": along(1, 0),
    **dict.fromkeys("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft".split(), along(2, -1)),
    **dict.fromkeys("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn".split(), all_but(2, None)),
    **dict.fromkeys("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2".split(), all_but(2, (-2, -1))),
    **dict.fromkeys(["fft_fftshift", "fft_ifftshift"], along(1)),
    **dict.fromkeys(["select"], removed()),
    "unbind": removed(1, 0),
    "flip": flipped,
    "diagonal": diagonal,
    **dict.fromkeys(
        ["tril", "triu", "matrix_exp", "linalg_matrix_exp", "inverse", "linalg_inv", "det", "logdet"], before_last(2)
    ),
    **dict.fromkeys(
        """linalg_det linalg_slogdet cholesky linalg_cholesky linalg_qr im2col col2im linalg_svd linalg_svdvals svd linalg_eigh
        linalg_eigvalsh linalg_eig linalg_eigvals linalg_pinv pinverse linalg_inv_ex linalg_cholesky_ex cholesky_inverse linalg_lu
        linalg_lu_factor linalg_lu_factor_ex qr linalg_cond linalg_matrix_power matrix_power istft""".split(),
        before_last(2),
    ),
    "diag_embed": last_diagonal,
    **dict.fromkeys(["multinomial", "view_as_complex", "stft"], before_last(1)),
    **dict.fromkeys(["one_hot", "view_as_real"], before_last(0)),
    "layer_norm": before_last(normalized_dims),
    "rms_norm": before_last(normalized_dims),
    **dict.fromkeys(["pad", "constant_pad_nd"], padded),
    **dict.fromkeys(
        "avg_pool1d max_pool1d max_pool1d_with_indices adaptive_avg_pool1d adaptive_max_pool1d".split(), before_last(1)
    ),
    **dict.fromkeys(
        "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d".split(), before_last(2)
    ),
    **dict.fromkeys(
        "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d adaptive_max_pool3d".split(), before_last(3)
    ),
    **dict.fromkeys("pixel_shuffle pixel_unshuffle".split(), before_last(3)),
    # along axis 1, whatever the rank
    **dict.fromkeys("channel_shuffle native_channel_shuffle".split(), along(99, 1)),
    **dict.fromkeys(
        """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d upsample_nearest_exact1d upsample_nearest_exact2d upsample_nearest_exact3d upsample_bilinear2d_aa
        upsample_bicubic2d_aa""".split(),
        before_last(after_channels),
    ),
    **dict.fromkeys(["group_norm", "instance_norm", "batch_norm", "affine_grid_generator"], first_only),
}

# Elementwise ops, as a table to look up; `where` with a condition alone is none.
KEEPS = frozenset(ELEMENTWISE) - {"where"}
# Ops whose operands have equal dims, not broadcast ones.
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
# Ops whose operands align from the right, so that a parameter can enter them row by row; these three take one value only.
# Some work on their last dims themselves.
INNER = {"scaled_dot_product_attention": 2}
ALIGNED = (frozenset(ELEMENTWISE) | JOINS | {"scaled_dot_product_attention", "cosine_similarity", "pairwise_distance"}) - {
    "masked_fill",
    "fill",
    "fake_quantize_per_tensor_affine",
}

# Ops of several tensors, and of one, that move samples by the shapes of their arguments alone, whatever is in them.
SHAPED = KEEPS | JOINS | (frozenset(CONTRACTIONS) - {"linear"}) | {"scaled_dot_product_attention"}
SHAPED_ALONE = (frozenset(SINGLE) | {"getitem"}) - {"layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"}

# Data movement without loss or repetition: every entry of the result is another entry of the operand (casts count as such).
MOVES = frozenset(
    """view reshape flatten unflatten ravel permute transpose swapaxes swapdims t mT T H mH adjoint movedim moveaxis squeeze unsqueeze
    select narrow split split_with_sizes chunk tensor_split unbind contiguous clone to float double half bfloat16 type alias view_as
    diagonal flip detach""".split()
)
# What these take are sizes: the shape of the result tells.
SIZED = frozenset(
    "view reshape unflatten view_as reshape_as unsafe_view expand broadcast_to repeat tile repeat_interleave".split()
)
_TAKES_NO_AXIS = KEEPS | SIZED
EXPANDS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})
# Their rules know samples on axis 0 only.
FIRST = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm instance_norm batch_norm".split()
)
# In-place forms of these change the shape of their own operand.
TURNS = frozenset("squeeze unsqueeze t transpose swapaxes swapdims".split())
# An index that brings samples together still picks rows that each belong to one sample.
INDEXING = frozenset({"getitem", "index_select"})
# Writing them back, likewise.
WRITES = frozenset("index_add index_copy index_fill index_reduce index_put scatter scatter_add scatter_reduce".split())
# What may be done to an order of rows (numbers of tokens) while it stays one.
KEEPS_ROWS = frozenset(
    "div floordiv floor_divide true_divide mul long int to getitem index_select clone contiguous detach view reshape flatten".split()
)
# Ops that take or write rows, which see for themselves what these meet.
TAKES = WRITES | INDEXING | {"gather", "take_along_dim", "masked_scatter", "nonzero", "argwhere"}
# Where other operands have the rows of one: as in broadcasting, or told here; a rule of a third party has its samples first.
BESIDE: dict[str, Beside] = {
    **dict.fromkeys(SEVERAL, from_the_right),
    **dict.fromkeys(["cat", "concat", "concatenate"], joined),
    **dict.fromkeys(["embedding", "searchsorted"], nothing),
    **dict.fromkeys(CONTRACTIONS, by_letter),
    **{name: in_groups for name in FIRST if name.startswith("conv")},
    **dict.fromkeys(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "max_unpool2d", "max_unpool3d"], everywhere_first),
    **dict.fromkeys(["cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d"], by_class),
    **dict.fromkeys(["multi_margin_loss", "multilabel_margin_loss"], of_margins),
    "samplewise.contractions.contract": by_spelled_letter,
    "cosine_embedding_loss": of_pairs,
    "ctc_loss": of_sequences,
    **dict.fromkeys(["linalg_solve", "linalg_solve_ex"], of_systems),
    "cdist": of_points,
    **{f"samplewise.recurrence.{name}": in_steps for name in ("steps", "state_products", "scan")},
}
# Lists of what occurs somewhere in the batch, and ops that take one entry.
LISTS = frozenset({"nonzero", "nonzero_static", "argwhere", "unique", "unique2", "unique_dim", "unique_consecutive"})
ENTRIES = frozenset("unbind select getitem to long int squeeze flatten view reshape".split())

# Ops that only move data, with the function that shows where.
EXAMPLES: dict[str, Several] = {
    "select_scatter": moved(torch.select_scatter, 2),
    "slice_scatter": moved(torch.slice_scatter, 2),
    "diagonal_scatter": moved(torch.diagonal_scatter, 2),
    **dict.fromkeys("view reshape flatten unflatten ravel view_as reshape_as unsafe_view".split(), reshaped_alike),
    "cat": moved(torch.cat),
    "concat": moved(torch.cat),
    "concatenate": moved(torch.cat),
    "stack": moved(torch.stack),
    "hstack": moved(torch.hstack),
    "vstack": moved(torch.vstack),
    "row_stack": moved(torch.vstack),
    "dstack": moved(torch.dstack),
    "column_stack": moved(torch.column_stack),
    "split": moved(Tensor.split),
    "split_with_sizes": moved(Tensor.split),
    "chunk": moved(torch.chunk),
    "tensor_split": moved(torch.tensor_split),
    "hsplit": moved(torch.hsplit),
    "vsplit": moved(torch.vsplit),
    "dsplit": moved(torch.dsplit),
    "unbind": moved(torch.unbind),
    "select": moved(torch.select),
    "narrow": moved(torch.narrow),
    "roll": moved(torch.roll),
    "flip": moved(Tensor.flip),
    "fliplr": moved(Tensor.fliplr),
    "flipud": moved(Tensor.flipud),
    "rot90": moved(torch.rot90),
    "unfold": moved(Tensor.unfold),
    "repeat_interleave": moved(torch.repeat_interleave),
    "diagonal": moved(torch.diagonal),
}
