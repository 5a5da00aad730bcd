"""The interface of `torch.nn.utils._expanded_weights` and of its call wrapper, on this library's engine.

A program that imports its names from here instead keeps working. See `call_for_per_sample_grads` and `ExpandedWeight`.
"""

from samplewise import rules as _rules  # noqa: F401  (fills the tables)

from .calls import call_for_per_sample_grads as call_for_per_sample_grads
from .convolution import conv_args_and_kwargs as conv_args_and_kwargs
from .convolution import conv_group_weight_grad_sample as conv_group_weight_grad_sample
from .convolution import conv_input_for_string_padding as conv_input_for_string_padding
from .convolution import conv_normalizer as conv_normalizer
from .convolution import conv_padding_for_same as conv_padding_for_same
from .convolution import conv_picker as conv_picker
from .convolution import conv_unfold_weight_grad_sample as conv_unfold_weight_grad_sample
from .convolution import int_padding_for_string_padding as int_padding_for_string_padding
from .convolution import unfold3d as unfold3d
from .handlers import ConvPerSampleGrad as ConvPerSampleGrad
from .handlers import EmbeddingPerSampleGrad as EmbeddingPerSampleGrad
from .handlers import GroupNormPerSampleGrad as GroupNormPerSampleGrad
from .handlers import InstanceNormPerSampleGrad as InstanceNormPerSampleGrad
from .handlers import LayerNormPerSampleGrad as LayerNormPerSampleGrad
from .handlers import LinearPerSampleGrad as LinearPerSampleGrad
from .helpers import forward_helper as forward_helper
from .helpers import maybe_scale_by_batch_size as maybe_scale_by_batch_size
from .helpers import set_grad_sample_if_exists as set_grad_sample_if_exists
from .helpers import standard_kwargs as standard_kwargs
from .helpers import sum_over_all_but_batch_and_last_n as sum_over_all_but_batch_and_last_n
from .helpers import unpack_expanded_weight_or_tensor as unpack_expanded_weight_or_tensor
from .tensor import HANDLED_FUNCTIONS as HANDLED_FUNCTIONS
from .tensor import ExpandedWeight as ExpandedWeight
from .tensor import implements_per_sample_grads as implements_per_sample_grads
from .tensor import is_batch_first as is_batch_first
