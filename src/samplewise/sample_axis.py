"""Where the sample axis goes: tables that name the ops of each family in `movement` and `alignment`.

An op that is in no table loses the axis; losing is always safe, because a parameter that meets a lost axis raises.
"""

from collections.abc import Callable

from torch import Tensor

from .alignment import (
    Several,
    batch_dims,
    broadcast,
    broadcast_along,
    chosen,
    class_loss,
    concatenated,
    contraction,
    distances,
    elementwise_loss,
    indexed,
    looked_up,
    selected,
    similarity,
    stacked,
)
from .axes import Axis, Call, Lost, Where, whole
from .contractions import CONTRACTIONS
from .errors import MixedSamplesError
from .movement import (
    Single,
    after_channels,
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
from .registry import RULES


def follow(call: Call, out: Tensor) -> Where | None:
    """Where the sample axis of one result of `call` is; None where no argument carries it."""
    lost = [where for x in call.tensors if isinstance(where := call.where(x), Lost)]
    if lost and not (call.name in INDEXING and isinstance(call.where(call.args[0]), Axis)):
        return _still_lost(call, lost)
    if not call.placed():
        return None
    if call.n <= 1:
        return whole(out)
    moved = _move(call, out)
    # a constant that broadcasts over the rows, and the like
    if isinstance(moved, Lost) and moved.linear and call.name != "sum":
        # a mean over picked or packed rows is none over samples
        return Lost(moved.op, moved.linear, moved.uniform and all(axis.ragged is None for _, axis in call.placed()))
    fits = isinstance(moved, Lost) or out.shape[moved.dim] == moved.size(call.n)
    return moved if fits else Lost(call.name)


def refuse_mixing(call: Call) -> None:
    """Raise for an op that mixes the samples of its operands, before it has run and changed anything.

    Raises:
        MixedSamplesError: Naming the op and the remedy.
    """
    if call.name in MIXING and call.placed():
        MIXING[call.name](call)


def _move(call: Call, out: Tensor) -> Where:
    name = call.name.removeprefix("special_")
    if name in CONTRACTIONS:
        return contraction(call, out)
    if name in SEVERAL:
        return SEVERAL[name](call, out)
    x, axis = call.placed()[0]
    if name in SINGLE and x is call.tensors[0] and len(call.placed()) == 1:
        return SINGLE[name](call, x, axis, out)
    if name not in {*SINGLE, *SEVERAL} and name in RULES and all(axis.dim == 0 for _, axis in call.placed()):
        # a rule of a third party, whose op has its samples on axis 0
        return axis
    return Lost(call.name)


def _still_lost(call: Call, lost: list[Lost]) -> Lost:
    """What arithmetic on a total leaves: sums and scalings stay linear in the samples, anything else does not."""
    carrying = [x for x in call.tensors if x.requires_grad]
    wheres = [call.where(x) for x in carrying]
    uniform = all(item.uniform for item in lost)
    linear = all(isinstance(where, Lost) and where.linear for where in wheres) and call.name in LINEAR
    if call.name in {"mul", "multiply"}:
        linear = linear and len(carrying) <= 1
    if call.name in {"div", "divide", "true_divide"}:
        linear = linear and not any(call.get(1, "other") is x for x in carrying)
        # the sum of losses by the sum of a mask: how much a sample weighs depends on the others
        uniform = uniform and not isinstance(call.get(1, "other"), Tensor)
    return Lost(lost[0].op, linear, uniform)


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
abs absolute acos acosh add addcdiv addcmul airy_ai alias alpha_dropout and angle arccos arccosh arcsin arcsinh arctan arctan2
arctanh asin asinh atan atan2 atanh bernoulli bessel_j0 bessel_j1 bessel_y0 bessel_y1 bfloat16 bitwise_and bitwise_left_shift
bitwise_not bitwise_or bitwise_right_shift bitwise_xor bool bucketize byte cdouble ceil celu cfloat chalf char clamp clamp_max
clamp_min clip clone complex conj conj_physical contiguous copy copysign cos cosh cpu cuda data deg2rad detach digamma div divide
double dropout elu empty_like entr eq erf erfc erfcx erfinv exp exp2 expit expm1 exponential feature_alpha_dropout feature_dropout
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

SEVERAL: dict[str, Several] = {
    **dict.fromkeys(ELEMENTWISE, broadcast),
    **dict.fromkeys(["cat", "concat", "concatenate"], concatenated),
    "stack": stacked,
    "where": chosen,
    "embedding": looked_up,
    "getitem": indexed,
    "index_select": selected,
    "scaled_dot_product_attention": batch_dims,
    "cdist": distances,
    **dict.fromkeys(["gather", "scatter", "scatter_add", "scatter_reduce", "index_fill"], broadcast_along(1)),
    "take_along_dim": broadcast_along(2),
    "masked_scatter": lambda call, _: Lost(call.name),
    # without `dim`, torch.cross takes the first axis of size 3, whichever that is
    "cross": broadcast_along(2),
    "linalg_cross": broadcast_along(2, -1),
    **dict.fromkeys(["cosine_similarity", "pairwise_distance"], similarity),
    **dict.fromkeys(["cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d"], class_loss),
    **dict.fromkeys(["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div"], elementwise_loss(2)),
    **dict.fromkeys(["binary_cross_entropy", "hinge_embedding_loss"], elementwise_loss(3)),
    **dict.fromkeys(["binary_cross_entropy_with_logits", "margin_ranking_loss"], elementwise_loss(4)),
    "cosine_embedding_loss": elementwise_loss(4, gone=1),
    "poisson_nll_loss": elementwise_loss(5),
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
        nanmedian mode max min aminmax""".split(),
        reduced(),
    ),
    **dict.fromkeys(["linalg_vector_norm", "norm", "kthvalue"], reduced(2)),
    **dict.fromkeys(
        ["softmax", "log_softmax", "safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"], along()
    ),
    **dict.fromkeys(["sort", "argsort", "glu"], along(1, -1)),
    "msort": along(99, 0),
    **dict.fromkeys(["topk", "diff"], along(2, -1)),
    "roll": along(2),
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"], along(2, 0)),
    **dict.fromkeys(["narrow", "unfold"], along(1)),
    **dict.fromkeys("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft".split(), along(2, -1)),
    **dict.fromkeys(["select"], removed()),
    "unbind": removed(1, 0),
    "flip": flipped,
    "diagonal": diagonal,
    **dict.fromkeys(
        ["tril", "triu", "matrix_exp", "linalg_matrix_exp", "inverse", "linalg_inv", "det", "logdet"], before_last(2)
    ),
    **dict.fromkeys(
        ["linalg_det", "linalg_slogdet", "cholesky", "linalg_cholesky", "linalg_qr", "im2col", "col2im"], before_last(2)
    ),
    "diag_embed": last_diagonal,
    **dict.fromkeys(["multinomial", "view_as_complex"], before_last(1)),
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
        upsample_trilinear3d _upsample_nearest_exact1d upsample_nearest_exact2d""".split(),
        before_last(after_channels),
    ),
    **dict.fromkeys("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(), first_only),
    **dict.fromkeys(["group_norm", "instance_norm", "batch_norm", "affine_grid_generator"], first_only),
}

# Ops whose operands have equal dims, not broadcast ones.
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
# Ops whose operands align from the right, so that a parameter can enter them row by row; these two take a 0-dim value only.
ALIGNED = (frozenset(ELEMENTWISE) | JOINS | {"scaled_dot_product_attention"}) - {"masked_fill", "fill"}

# Data movement without loss or repetition: every entry of the result is another entry of the operand (casts count as such).
MOVES = frozenset(
    """view reshape flatten unflatten ravel permute transpose swapaxes swapdims t mT T H mH adjoint movedim moveaxis squeeze unsqueeze
    select narrow split split_with_sizes chunk tensor_split unbind contiguous clone to float double half bfloat16 type alias view_as
    diagonal flip detach""".split()
)
EXPANDS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})
# In-place forms of these change the shape of their own operand.
TURNS = frozenset("squeeze unsqueeze t transpose swapaxes swapdims".split())
# An index that brings samples together still picks rows that each belong to one sample.
INDEXING = frozenset({"getitem", "index_select"})
