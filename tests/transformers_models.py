"""Hugging Face models, unmodified, with tiny random configurations: the table behind test_transformers.py and docs/models.md.

`python -m tests.transformers_models` checks every row again and writes the page.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samplewise as sw

Batch = dict[str, Tensor]
N, VOCABULARY, CLASSES = 3, 17, 5
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# Internal casts to float32 (a router, mostly) leave float32 noise in float64 models.
FLOAT64, FLOAT32 = 1e-8, 1e-5


@dataclass(frozen=True)
class Case:
    """One architecture with a tiny configuration, a batch, and a loss per sample."""

    name: str
    family: str
    architecture: str
    config: dict[str, Any]
    batch: Callable[[], Batch]
    loss: Callable[[Any, Batch], Tensor]
    note: str = ""
    tolerance: float = FLOAT64
    dtype: torch.dtype = torch.float64
    # A batch of one is what the loop runs; more copies, where torch itself is wrong for one.
    copies: int = 1
    # What the user does with the model before recording: adapters, freezing, train().
    prepare: Callable[[nn.Module], nn.Module] = nn.Module.eval

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.name, self.note)))

    @property
    def refused(self) -> str:
        """A pattern of the error, if the case is refused."""
        return REFUSED.get(str(self), ("", ""))[1]

    def model(self) -> nn.Module:
        """The model in float64, moved off its initial values so that no gradient vanishes for a zero (LoRA's B, biases)."""
        torch.manual_seed(0)
        made = getattr(importlib.import_module("transformers"), self.architecture)
        model = self.prepare(made(made.config_class(**self.config)).eval()).to(self.dtype)
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        return model


# --- the judge ----------------------------------------------------------------------------------------------------------------


def one_by_one(case: Case, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The gradients of each sample's loss, from a batch of that sample alone, by ordinary autograd."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for i in range(N):
        loss = case.loss(model, alone(case, batch, i))[0]
        rows.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(found) for name, *found in zip(parameters, *rows, strict=True)}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a parameter's rows, relative to its largest entry, or to a millionth of the model's.

    A key bias has gradient zero but for rounding: relative to itself its noise would be an error.
    """
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(rows.abs().max() for rows in expected.values() if rows.numel())
    errors = [
        (found[name] - rows).abs().max() / torch.maximum(rows.abs().max(), floor)
        for name, rows in expected.items()
        if rows.numel()
    ]
    return torch.stack(errors).max().item()


def recorded(case: Case, model: nn.Module, batch: Batch) -> sw.Record:
    with sw.record(model, batch_size=N) as rec:
        rec.backward(case.loss(model, batch))
    return rec


def alone(case: Case, batch: Batch, i: int) -> Batch:
    return {name: x[[i] * case.copies] for name, x in batch.items()}


def outcome(case: Case) -> str:
    """Either "exact", or the message of the refusal; raises where numbers are wrong."""
    model, batch = case.model(), case.batch()
    try:
        found = recorded(case, model, batch).grads()
    except sw.SamplewiseError as error:
        return str(error)
    own = torch.stack([case.loss(model, alone(case, batch, i))[0] for i in range(N)])
    assert torch.allclose(case.loss(model, batch), own, rtol=1e-5), (
        f"{case}: the model itself gives a sample other losses alone"
    )
    expected = one_by_one(case, model, batch)
    # samples must differ, or a mistaken order of rows would pass
    assert largest_error({name: rows.roll(1, 0) for name, rows in expected.items()}, expected) > 1e-2
    error = largest_error(found, expected)
    assert error <= case.tolerance, f"{case}: relative error {error:.1e}"
    if case.copies == 1:
        sw.verify(model, case.loss, batch, tolerance=case.tolerance)
    return "exact"


# --- losses, one per sample ---------------------------------------------------------------------------------------------------


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy over each sample's own labels; -100 is none."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / labels.ne(-100).sum(1)


def outputs(model: nn.Module, batch: Batch) -> Any:
    return model(**{name: x for name, x in batch.items() if name != "labels"})


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    # a model of images and text may answer for the image's tokens too, which come first
    labels = batch["labels"]
    return token_loss(outputs(model, batch).logits[:, -labels.shape[1] : -1], labels[:, 1:])


def each_token(model: nn.Module, batch: Batch) -> Tensor:
    return token_loss(outputs(model, batch).logits, batch["labels"])


def one_class(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs(model, batch).logits, batch["labels"], reduction="none")


def each_pixel(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs(model, batch).logits, batch["labels"], reduction="none").flatten(1).mean(1)


def waves(*names: str) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss of every entry of the named outputs."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = outputs(model, batch)
        return sum(getattr(out, name).sin().flatten(1).sum(1) for name in names)

    return loss


def pairs(model: nn.Module, batch: Batch) -> Tensor:
    """How well each image fits its own text."""
    out = outputs(model, batch)
    return (out.image_embeds * out.text_embeds).sum(1)


def contrast(model: nn.Module, batch: Batch) -> Tensor:
    """The in-batch contrastive loss: every image against all texts of the batch."""
    logits = outputs(model, batch).logits_per_image
    return F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")


def towers(model: nn.Module, batch: Batch) -> Tensor:
    """The two towers called one after the other; the model's own forward never runs."""
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    return (text - model.get_image_features(batch["pixel_values"]).pooler_output).square().sum(1)


# --- batches ------------------------------------------------------------------------------------------------------------------


def tokens(length: int = 5, padding: str = "right") -> Callable[[], Batch]:
    """Random tokens; the second sample is one shorter, the third two (but has two tokens), padded on the left or right."""

    def make() -> Batch:
        torch.manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (N, length))
        mask = torch.ones_like(ids)
        for i in range(N):
            mask[i, max(2, length - i) :] = 0
        if padding == "left":
            mask = mask.flip(1)
        labels = torch.randint(3, VOCABULARY, (N, length)).where(mask.bool(), -100)
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}

    return make


def normal(name: str, *shape: int, labels: tuple[int, ...] = ()) -> Callable[[], Batch]:
    """A normally distributed input, with a class per sample or per pixel."""

    def make() -> Batch:
        torch.manual_seed(1)
        return {name: torch.randn(N, *shape).double(), "labels": torch.randint(CLASSES, (N, *labels))}

    return make


def images(size: int = 16, *labels: int) -> Callable[[], Batch]:
    return normal("pixel_values", 3, size, size, labels=labels)


def joined(*parts: Callable[[], Batch], **more: Callable[[], Tensor]) -> Callable[[], Batch]:
    """Several inputs; where names clash, those of the last part count."""

    def make() -> Batch:
        batch = {name: x for part in parts for name, x in part().items()}
        return batch | {name: value() for name, value in more.items()}

    return make


def targets(length: int = 4) -> Callable[[], Batch]:
    """What the decoder reads and predicts."""

    def make() -> Batch:
        batch = tokens(length)()
        return {"decoder_input_ids": batch["input_ids"], "labels": batch["labels"]}

    return make


def image_tokens() -> Batch:
    """Four placeholders (16) for the image, then text."""
    batch = tokens(7)()
    text = batch["input_ids"].clamp(max=15)
    text[:, :4] = 16
    return batch | {"input_ids": text, "pixel_values": images()()["pixel_values"]}


# --- the table ----------------------------------------------------------------------------------------------------------------

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **LAYERS, **SPECIAL}
LLAMA = {**TEXT, "num_key_value_heads": 1}
IMAGE = {**LAYERS, "image_size": 16, "patch_size": 8, "num_labels": CLASSES}
PYRAMID = {"depths": [1, 1], "hidden_sizes": [8, 8], "num_labels": CLASSES}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    **{
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
    },
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **SPECIAL,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
SPEECH = {
    "vocab_size": VOCABULARY,
    **LAYERS,
    "conv_dim": [8, 8],
    "conv_stride": [4, 2],
    "conv_kernel": [5, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": CLASSES,
}
TOWERS = {
    "text_config": {**TEXT, "projection_dim": 8},
    "vision_config": {**LAYERS, "image_size": 16, "patch_size": 8, "projection_dim": 8},
}


def decoder(
    name: str, architecture: str, *, sdpa: bool = True, family: str = "decoder", tolerance: float = FLOAT64, **config: Any
) -> list[Case]:
    """With T equal to n, padded right; and with T = 5, where the model has sdpa padded left.

    (Eager attention in float64 gives NaN for padding on the left, with transformers alone too.)
    """
    eager = {**LLAMA, **config, "attn_implementation": "eager"}
    cases = [Case(name, family, architecture, eager, tokens(3), next_token, "eager, T = n" if sdpa else "T = n", tolerance)]
    if sdpa:
        batch, note = tokens(5, "left"), "sdpa, padded left"
        return [
            *cases,
            Case(name, family, architecture, {**eager, "attn_implementation": "sdpa"}, batch, next_token, note, tolerance),
        ]
    return [*cases, Case(name, family, architecture, eager, tokens(5), next_token, "T = 5", tolerance)]


def encoder(
    name: str, architecture: str, batch: Callable[[], Batch] | None = None, *, drop: str = "", note: str = "", **config: Any
) -> list[Case]:
    config = {key: value for key, value in {**TEXT, **config}.items() if key not in drop.split()}
    return [Case(name, "encoder", architecture, config, batch or tokens(5), each_token, note)]


def seq2seq(
    name: str, architecture: str, batch: Callable[[], Batch] | None = None, *, base: dict[str, Any] = SEQ2SEQ, **more: Any
) -> list[Case]:
    return [Case(name, "encoder-decoder", architecture, {**base, **more}, batch or joined(tokens(5), targets()), each_token)]


def vision(
    name: str,
    architecture: str,
    batch: Callable[[], Batch] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = one_class,
    *,
    family: str = "vision",
    note: str = "",
    base: dict[str, Any] = IMAGE,
    **config: Any,
) -> list[Case]:
    return [Case(name, family, architecture, {**base, **config}, batch or images(), loss, note)]


def experts(name: str, architecture: str, *, tolerance: float = FLOAT64, **config: Any) -> list[Case]:
    """Experts one after the other (eager), and weights gathered by token (batched_mm); the default, grouped_mm, has no float64."""
    config = {**LLAMA, "num_experts_per_tok": 2, **config}
    return [
        Case(
            name,
            "mixture of experts",
            architecture,
            {**config, "experts_implementation": how},
            tokens(5),
            next_token,
            f"{how} experts",
            tolerance,
        )
        for how in ("eager", "batched_mm")
    ]


def adapters(name: str, make: Callable[[Any], Any], architecture: str = "LlamaForCausalLM") -> list[Case]:
    """Llama or GPT-2 with adapters of peft: only they are trainable."""

    def prepare(model: nn.Module) -> nn.Module:
        peft = importlib.import_module("peft")
        return peft.get_peft_model(model, make(peft)).eval()

    return [Case(name, "adapters (peft)", architecture, LLAMA, tokens(5), next_token, prepare=prepare)]


def frozen_scale(model: nn.Module) -> nn.Module:
    model.logit_scale.requires_grad_(False)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model.train()


ATTENTION = ["q_proj", "v_proj"]
PLAIN = {"num_labels": CLASSES}
MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    **MLA,
}

# fmt: off
CASES: list[Case] = [
    *decoder("GPT-2", "GPT2LMHeadModel"),
    *decoder("GPT-Neo", "GPTNeoForCausalLM", sdpa=False, attention_types=[[["global", "local"], 1]], window_size=3),
    *decoder("GPT-NeoX", "GPTNeoXForCausalLM"),
    *decoder("GPT-J", "GPTJForCausalLM", sdpa=False, rotary_dim=4),
    *decoder("OPT", "OPTForCausalLM", word_embed_proj_dim=16, ffn_dim=24),
    *decoder("Bloom", "BloomForCausalLM", sdpa=False),
    *decoder("Llama", "LlamaForCausalLM"),
    *decoder("Mistral", "MistralForCausalLM", sliding_window=3),
    *decoder("Qwen2", "Qwen2ForCausalLM"),
    *decoder("Qwen3", "Qwen3ForCausalLM", head_dim=8),
    *decoder("Gemma", "GemmaForCausalLM", tolerance=FLOAT32, head_dim=8),
    *decoder("Gemma 2", "Gemma2ForCausalLM", tolerance=FLOAT32, sdpa=False, head_dim=8, sliding_window=3),
    *decoder("Gemma 3", "Gemma3ForCausalLM", tolerance=FLOAT32, head_dim=8, sliding_window=3),
    *decoder("Phi", "PhiForCausalLM"),
    *decoder("Phi-3", "Phi3ForCausalLM"),
    *decoder("Falcon", "FalconForCausalLM"),
    *decoder("StableLM", "StableLmForCausalLM"),
    *decoder("OLMo 2", "Olmo2ForCausalLM"),
    *decoder("Cohere", "CohereForCausalLM"),
    *decoder("MPT", "MptForCausalLM", sdpa=False, d_model=16, n_heads=2, n_layers=2),
    *decoder("CodeGen", "CodeGenForCausalLM", sdpa=False, num_attention_heads=4, rotary_dim=4),
    *decoder("Starcoder 2", "Starcoder2ForCausalLM", sliding_window=3),
    *decoder("BioGPT", "BioGptForCausalLM"),
    *decoder("GLM", "GlmForCausalLM", head_dim=8),
    *decoder("Nemotron", "NemotronForCausalLM"),
    *decoder("SmolLM3", "SmolLM3ForCausalLM"),
    *decoder("OpenAI GPT", "OpenAIGPTLMHeadModel", sdpa=False),
    *decoder("CTRL", "CTRLLMHeadModel", dff=24),
    Case("Llama", "decoder", "LlamaForCausalLM", LLAMA, tokens(5), next_token, "gradient checkpointing", prepare=checkpointed),
    Case("TrOCR", "decoder", "TrOCRForCausalLM", {**SEQ2SEQ, "is_decoder": True}, tokens(5), next_token),
    *decoder("Mamba", "MambaForCausalLM", sdpa=False, family="state space", state_size=4, time_step_rank=2),
    *decoder("Mamba 2", "Mamba2ForCausalLM", sdpa=False, family="state space", state_size=4, num_heads=4, head_dim=8,
         n_groups=1, chunk_size=2),
    *decoder("FalconMamba", "FalconMambaForCausalLM", sdpa=False, family="state space", state_size=4, time_step_rank=2),
    *decoder("RecurrentGemma", "RecurrentGemmaForCausalLM", tolerance=FLOAT32, family="state space", lru_width=16,
         attention_window_size=3,
         num_hidden_layers=3),
    *decoder("Jamba", "JambaForCausalLM", family="state space", num_experts=1, num_experts_per_tok=1, attn_layer_period=2,
         attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False),
    *decoder("LFM2", "Lfm2ForCausalLM", family="state space", layer_types=["conv", "full_attention"]),
    *decoder("Bamba", "BambaForCausalLM", family="state space", attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8,
         mamba_d_state=4, mamba_chunk_size=2),
    *decoder("Qwen3-Next", "Qwen3NextForCausalLM", tolerance=FLOAT32, family="state space", head_dim=8, num_experts=0,
         linear_num_key_heads=2,
         linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, mlp_only_layers=[0, 1],
         layer_types=["linear_attention", "full_attention"]),
    # in evaluation RWKV rescales its weights in place, which no backward survives; it has no dropout
    Case("RWKV", "state space", "RwkvForCausalLM", {**TEXT, "attention_hidden_size": 16, "context_length": 16}, lambda: {k: v
         for k, v in tokens(5)().items() if k != "attention_mask"}, next_token, prepare=nn.Module.train),
    *experts("Mixtral", "MixtralForCausalLM", num_local_experts=4),
    *experts("Qwen2-MoE", "Qwen2MoeForCausalLM", num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8),
    *experts("Qwen3-MoE", "Qwen3MoeForCausalLM", num_experts=4, moe_intermediate_size=8, head_dim=8),
    *experts("OLMoE", "OlmoeForCausalLM", num_experts=4),
    *experts("GPT-OSS", "GptOssForCausalLM", num_local_experts=4, head_dim=8, sliding_window=3),
    *experts("GraniteMoE", "GraniteMoeForCausalLM", num_local_experts=4),
    *experts("PhiMoE", "PhimoeForCausalLM", num_local_experts=4),
    *experts("Ernie 4.5 MoE", "Ernie4_5_MoeForCausalLM", tolerance=FLOAT32, moe_num_experts=4, moe_k=2,
         moe_intermediate_size=8),
    *experts("GLM-4 MoE", "Glm4MoeForCausalLM", tolerance=FLOAT32, n_routed_experts=4, moe_intermediate_size=8,
         first_k_dense_replace=1, head_dim=8),
    *experts("DeepSeek-V2", "DeepseekV2ForCausalLM", tolerance=FLOAT32, **DEEPSEEK),
    *experts("DeepSeek-V3", "DeepseekV3ForCausalLM", tolerance=FLOAT32, num_local_experts=4, **DEEPSEEK),
    Case("Llama 4", "mixture of experts", "Llama4ForCausalLM", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 2,
         "head_dim": 8, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 24}, tokens(5), next_token, tolerance=FLOAT32),
    Case("Mixtral", "mixture of experts", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
         tokens(5), next_token, "grouped_mm experts", 0.0001, torch.float32),
    Case("JetMoE", "mixture of experts", "JetMoeForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2,
         "kv_channels": 8}, tokens(5), next_token),
    Case("Switch Transformers", "mixture of experts", "SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 2,
         "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, joined(tokens(5), targets()), each_token,
         tolerance=FLOAT32),
    *encoder("BERT", "BertForMaskedLM"),
    *encoder("BERT", "BertForMaskedLM", tokens(3), note="eager, T = n", attn_implementation="eager"),
    *encoder("DistilBERT", "DistilBertForMaskedLM", dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    *encoder("ALBERT", "AlbertForMaskedLM", embedding_size=8),
    *encoder("RoBERTa", "RobertaForMaskedLM"),
    *encoder("XLM-RoBERTa", "XLMRobertaForMaskedLM"),
    *encoder("CamemBERT", "CamembertForMaskedLM"),
    *encoder("DeBERTa", "DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8),
    *encoder("DeBERTa-v2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4,
         share_att_key=True),
    *encoder("ELECTRA", "ElectraForMaskedLM", embedding_size=8),
    *encoder("MPNet", "MPNetForMaskedLM"),
    *encoder("FNet", "FNetForMaskedLM", lambda: {k: v for k, v in tokens(5)().items() if k != "attention_mask"}),
    *encoder("ModernBERT", "ModernBertForMaskedLM", local_attention=4, cls_token_id=1, sep_token_id=2),
    *encoder("Longformer", "LongformerForMaskedLM", tokens(8), attention_window=[4, 4]),
    *encoder("BigBird", "BigBirdForMaskedLM", note="full attention", attention_type="original_full"),
    *encoder("BigBird", "BigBirdForMaskedLM", tokens(40), note="sparse attention", attention_type="block_sparse", block_size=2,
         num_random_blocks=1, max_position_embeddings=64),
    *encoder("RoFormer", "RoFormerForMaskedLM", embedding_size=16),
    *encoder("ConvBERT", "ConvBertForMaskedLM", embedding_size=16, head_ratio=1, num_groups=1, conv_kernel_size=3),
    *encoder("SqueezeBERT", "SqueezeBertForMaskedLM", embedding_size=16, q_groups=2, k_groups=2, v_groups=2,
         intermediate_groups=2, output_groups=2),
    *encoder("MobileBERT", "MobileBertForMaskedLM", embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    *encoder("Nyströmformer", "NystromformerForMaskedLM", tokens(4), num_landmarks=4, segment_means_seq_len=4),
    *encoder("ESM", "EsmForMaskedLM", mask_token_id=16),
    *encoder("XLM", "XLMWithLMHeadModel", emb_dim=16, n_layers=2, n_heads=2),
    *encoder("XLNet", "XLNetLMHeadModel", drop="max_position_embeddings " + " ".join(LAYERS), d_model=16, n_head=2, n_layer=2,
         d_inner=24),
    *encoder("Funnel", "FunnelForMaskedLM", tokens(6), drop="max_position_embeddings " + " ".join(LAYERS), d_model=16, n_head=2,
         d_head=8, d_inner=24, block_sizes=[1, 1], num_decoder_layers=1),
    *encoder("ERNIE", "ErnieForMaskedLM"),
    *encoder("Data2VecText", "Data2VecTextForMaskedLM"),
    *encoder("YOSO", "YosoForMaskedLM"),
    *encoder("I-BERT", "IBertForMaskedLM"),
    *encoder("LUKE", "LukeForMaskedLM", entity_vocab_size=5, entity_emb_size=8),
    *encoder("LiLT", "LiltForTokenClassification", joined(tokens(5), bbox=lambda: torch.arange(N * 20).view(N, 5, 4) % 16),
         num_labels=VOCABULARY, hidden_size=24, max_2d_position_embeddings=32, channel_shrink_ratio=2),
    *seq2seq("T5", "T5ForConditionalGeneration", base=T5),
    *seq2seq("mT5", "MT5ForConditionalGeneration", base=T5),
    *seq2seq("UMT5", "UMT5ForConditionalGeneration", base=T5),
    *seq2seq("BART", "BartForConditionalGeneration"),
    *seq2seq("mBART", "MBartForConditionalGeneration"),
    *seq2seq("Marian", "MarianMTModel"),
    *seq2seq("Pegasus", "PegasusForConditionalGeneration"),
    *seq2seq("Blenderbot", "BlenderbotForConditionalGeneration"),
    *seq2seq("M2M-100", "M2M100ForConditionalGeneration"),
    *seq2seq("LED", "LEDForConditionalGeneration", joined(tokens(8), targets()), attention_window=4,
         max_encoder_position_embeddings=16, max_decoder_position_embeddings=16),
    *vision("ViT", "ViTForImageClassification", note="sdpa", attn_implementation="sdpa"),
    *vision("ViT", "ViTForImageClassification", note="eager", attn_implementation="eager"),
    *vision("DeiT", "DeiTForImageClassification"),
    *vision("BEiT", "BeitForImageClassification", use_relative_position_bias=True),
    *vision("Data2VecVision", "Data2VecVisionForImageClassification", use_relative_position_bias=True),
    *vision("DINOv2", "Dinov2ForImageClassification"),
    *vision("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", num_register_tokens=2),
    *vision("I-JEPA", "IJepaForImageClassification"),
    *vision("ViT-MSN", "ViTMSNForImageClassification"),
    *vision("ViT-MAE", "ViTMAEForPreTraining", joined(images(), noise=lambda: torch.rand(N, 16).double()), waves("logits"),
         patch_size=4, mask_ratio=0.5, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
         decoder_intermediate_size=24),
    *vision("Swin", "SwinForImageClassification", base=PLAIN, image_size=16, patch_size=2, embed_dim=8, depths=[2, 1],
         num_heads=[2, 2], window_size=2),
    *vision("Swin", "SwinForImageClassification", note="padded windows", base=PLAIN, image_size=16, patch_size=2, embed_dim=8,
         depths=[2, 1], num_heads=[2, 2], window_size=3),
    *vision("Swin v2", "Swinv2ForImageClassification", base=PLAIN, image_size=16, patch_size=2, embed_dim=8, depths=[2, 1],
         num_heads=[2, 2], window_size=2),
    *vision("ConvNeXt", "ConvNextForImageClassification", base=PYRAMID, num_stages=2),
    *vision("ConvNeXt v2", "ConvNextV2ForImageClassification", base=PYRAMID, num_stages=2),
    *vision("DINOv3", "DINOv3ViTModel", None, waves("last_hidden_state")),
    *vision("DINOv3 ConvNeXt", "DINOv3ConvNextModel", images(32), waves("last_hidden_state"), base={}, hidden_sizes=[8] * 4,
         depths=[1] * 4),
    *vision("SegFormer", "SegformerForSemanticSegmentation", images(16, 8, 8), each_pixel, base=PYRAMID, num_encoder_blocks=2,
         num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2],
         decoder_hidden_size=8),
    *vision("MobileViT", "MobileViTForImageClassification", images(32), base=PLAIN, image_size=32, patch_size=1,
         hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8] * 7, num_attention_heads=2, expand_ratio=1.0),
    *vision("PoolFormer", "PoolFormerForImageClassification", base=PYRAMID, num_encoder_blocks=2, patch_sizes=[3, 3],
         strides=[2, 2], padding=[1, 1], mlp_ratio=2.0),
    Case("CvT", "vision", "CvtForImageClassification", {**PLAIN, "embed_dim": [8, 8, 8], "num_heads": [1, 2, 2], "depth": [1, 2,
         3]}, images(32), one_class, copies=2),
    *vision("ResNet", "ResNetForImageClassification", base=PYRAMID, embedding_size=8, layer_type="basic"),
    *vision("RegNet", "RegNetForImageClassification", base=PYRAMID, embedding_size=8, groups_width=4),
    *vision("BiT", "BitForImageClassification", base=PYRAMID, embedding_size=8, num_groups=2),
    *vision("PVT", "PvtForImageClassification", base=PYRAMID, image_size=16, num_encoder_blocks=2, sequence_reduction_ratios=[2,
         1], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    *vision("PVT v2", "PvtV2ForImageClassification", base=PYRAMID, image_size=16, num_encoder_blocks=2, sr_ratios=[2, 1],
         patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    *vision("FocalNet", "FocalNetForImageClassification", base=PLAIN, image_size=16, patch_size=4, embed_dim=8, depths=[1, 1],
         hidden_sizes=[8, 16], focal_levels=[2, 2], focal_windows=[3, 3]),
    *vision("SwiftFormer", "SwiftFormerForImageClassification", images(32), base=PLAIN, image_size=32, depths=[1, 1],
         embed_dims=[8, 8], mlp_ratio=2, downsamples=[True, True]),
    *vision("Hiera", "HieraForImageClassification", images(32), base=PLAIN, image_size=[32, 32], embed_dim=8, depths=[1, 1],
         num_heads=[1, 2], patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], masked_unit_size=[4, 4],
         num_query_pool=1, query_stride=[2, 2], mlp_ratio=2.0),
    *vision("DPT", "DPTForSemanticSegmentation", images(16, 32, 32), each_pixel, patch_size=4, backbone_out_indices=[0, 1],
         neck_hidden_sizes=[8, 8], reassemble_factors=[2, 1], fusion_hidden_size=8, use_auxiliary_head=False, is_hybrid=False,
         neck_ignore_stages=[]),
    *vision("UperNet", "UperNetForSemanticSegmentation", images(32, 32, 32), each_pixel, base=PLAIN,
         backbone_config={"model_type": "convnext", "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_stages": 4, "out_features":
         [f"stage{i}" for i in range(1, 5)]}, hidden_size=8, use_auxiliary_head=False, pool_scales=[1]),
    *vision("DETR", "DetrForObjectDetection", images(32), waves("logits", "pred_boxes"), base=PLAIN, use_timm_backbone=False,
         backbone=None, backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1],
         "layer_type": "basic", "out_features": ["stage2"]}, **{k: v // 2 if k.endswith("layers") else v for k, v in
         SEQ2SEQ.items() if k.startswith(("encoder", "decoder_l", "decoder_a", "decoder_f"))}, d_model=16, num_queries=4),
    *vision("YOLOS", "YolosForObjectDetection", images(), waves("logits", "pred_boxes"), image_size=[16, 16],
         num_detection_tokens=3),
    *vision("VideoMAE", "VideoMAEForVideoClassification", normal("pixel_values", 2, 3, 16, 16), family="video", num_frames=2,
         tubelet_size=1),
    *vision("ViViT", "VivitForVideoClassification", normal("pixel_values", 2, 3, 16, 16), family="video", num_frames=2,
         tubelet_size=[1, 8, 8]),
    *vision("TimeSformer", "TimesformerForVideoClassification", normal("pixel_values", 2, 3, 16, 16), family="video",
         num_frames=2),
    *[Case(name, "speech", f"{stem}ForSequenceClassification", {**SPEECH, **more}, normal("input_values", 60), one_class) for
         name, stem, more in [("Wav2Vec2", "Wav2Vec2", {}), ("HuBERT", "Hubert", {}), ("WavLM", "WavLM", {}), ("UniSpeech",
         "UniSpeech", {}), ("Data2VecAudio", "Data2VecAudio", {}), ("Wav2Vec2-Conformer", "Wav2Vec2Conformer", {}), ("SEW",
         "SEW", {"squeeze_factor": 2})]],
    *vision("AST", "ASTForAudioClassification", normal("input_values", 24, 16), family="speech", frequency_stride=8,
         time_stride=8, max_length=24, num_mel_bins=16),
    *[Case(name, "speech", f"{stem}ForConditionalGeneration", {**SEQ2SEQ, **more}, joined(normal("input_features", *shape),
         targets()), each_token) for name, stem, shape, more in [("Whisper", "Whisper", (8, 12), {"num_mel_bins": 8,
         "max_source_positions": 6, "max_target_positions": 8}), ("Speech2Text", "Speech2Text", (12, 8),
         {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 8, "max_source_positions": 12,
         "max_target_positions": 8})]],
    Case("Moonshine", "speech", "MoonshineForConditionalGeneration", {"vocab_size": VOCABULARY, "hidden_size": 16,
         "intermediate_size": 24, "decoder_start_token_id": 1, **{f"{side}_num_{what}": 2 for side in ("encoder", "decoder") for
         what in ("hidden_layers", "attention_heads", "key_value_heads")}, **SPECIAL}, joined(normal("input_values", 2000),
         targets()), each_token),
    Case("CLIP", "image and text", "CLIPModel", {**TOWERS, "projection_dim": 8}, joined(images(), tokens(5)), towers,
         "each tower, a loss per pair"),
    Case("CLIP", "image and text", "CLIPModel", {**TOWERS, "projection_dim": 8}, joined(images(), tokens(5)), pairs,
         "a loss per pair, `logit_scale` frozen", prepare=frozen_scale),
    Case("CLIP", "image and text", "CLIPModel", {**TOWERS, "projection_dim": 8}, joined(images(), tokens(5)), pairs,
         "a loss per pair"),
    Case("CLIP", "image and text", "CLIPModel", {**TOWERS, "projection_dim": 8}, joined(images(), tokens(5)), contrast,
         "contrastive loss"),
    Case("CLIP", "image and text", "CLIPModel", {**TOWERS, "projection_dim": 8}, joined(images(), tokens(5)), contrast,
         "contrastive loss, `logit_scale` frozen", prepare=frozen_scale),
    Case("SigLIP", "image and text", "SiglipModel", TOWERS, joined(images(), tokens(5)), pairs, "a loss per pair"),
    Case("ViLT", "image and text", "ViltForQuestionAnswering", {**TEXT, "image_size": 16, "patch_size": 8, "max_image_length":
         -1, **PLAIN}, lambda: tokens(5)() | images()(), one_class),
    Case("GIT", "image and text", "GitForCausalLM", {**TEXT, "vision_config": {**LAYERS, "image_size": 16, "patch_size": 8}},
         joined(images(), tokens(5)), next_token),
    Case("LLaVA", "image and text", "LlavaForConditionalGeneration", {"text_config": {**LLAMA, "model_type": "llama"},
         "vision_config": {**LAYERS, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}, "image_token_id":
         16, "vision_feature_layer": -1}, image_tokens, next_token),
    Case("PaliGemma", "image and text", "PaliGemmaForConditionalGeneration", {"text_config": {**LLAMA, "model_type": "gemma",
         "head_dim": 8}, "vision_config": {**LAYERS, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8,
         "vision_use_head": False}, "image_token_id": 16, "projection_dim": 16}, joined(image_tokens, token_type_ids=lambda:
         torch.arange(7).ge(4).long().repeat(N, 1)), next_token, tolerance=FLOAT32),
    *vision("Perceiver", "PerceiverForImageClassificationLearned", images(16), lambda model, batch:
         F.cross_entropy(model(inputs=batch["pixel_values"]).logits, batch["labels"], reduction="none"), family="other",
         base=PLAIN, image_size=16, num_latents=4, d_latents=8, num_blocks=1, num_self_attends_per_block=1,
         num_self_attention_heads=2, num_cross_attention_heads=1),
    *[Case(name, "other", f"{stem}ForPrediction", {"num_input_channels": 2, "context_length": 16, "patch_length": 4,
         "patch_stride": 4, "d_model": 8, "prediction_length": 3, **more}, normal("past_values", 16, 2),
         waves("prediction_outputs")) for name, stem, more in [("PatchTST", "PatchTST", {"num_hidden_layers": 2,
         "num_attention_heads": 2, "ffn_dim": 24}), ("PatchTSMixer", "PatchTSMixer", {"num_layers": 2})]],
    Case("Decision Transformer", "other", "DecisionTransformerModel", {"state_dim": 5, "act_dim": 2, "hidden_size": 16,
         "max_ep_len": 16, "n_layer": 2, "n_head": 2}, joined(normal("states", 4, 5), normal("actions", 4, 2), normal("rewards",
         4, 1), normal("returns_to_go", 4, 1), timesteps=lambda: torch.arange(4).repeat(N, 1), attention_mask=lambda:
         torch.ones(N, 4)), waves("action_preds", "state_preds", "return_preds")),
    *adapters("LoRA on Llama", lambda peft: peft.LoraConfig(r=2, target_modules=ATTENTION)),
    *adapters("LoRA on GPT-2", lambda peft: peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
         "GPT2LMHeadModel"),
    *adapters("LoRA, embedding", lambda peft: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    *adapters("LoRA, head trained too", lambda peft: peft.LoraConfig(r=2, target_modules=ATTENTION,
         modules_to_save=["lm_head"])),
    *adapters("rsLoRA, every layer", lambda peft: peft.LoraConfig(r=2, target_modules="all-linear", use_rslora=True,
         task_type="CAUSAL_LM")),
    *adapters("DoRA", lambda peft: peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True)),
    *adapters("AdaLoRA", lambda peft: peft.AdaLoraConfig(init_r=2, target_r=2, target_modules=ATTENTION, total_step=10)),
    *adapters("LoKr", lambda peft: peft.LoKrConfig(r=2, target_modules=ATTENTION)),
    *adapters("LoHa", lambda peft: peft.LoHaConfig(r=2, target_modules=ATTENTION)),
    *adapters("VeRA", lambda peft: peft.VeraConfig(r=2, target_modules=["q_proj"])),
    *adapters("OFT", lambda peft: peft.OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION)),
    *adapters("IA3", lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    *adapters("Prompt tuning", lambda peft: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    *adapters("P-tuning", lambda peft: peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8,
         task_type="CAUSAL_LM")),
    *adapters("Prefix tuning", lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
]
# fmt: on


STRIDED = "sliding windows by `as_strided`", r"was lost in as_strided"
CONTRASTED = "rightly: the loss mixes samples", r"matmul"
# What the engine refuses, why, and a pattern of its message. A case that becomes exact only leaves this table.
REFUSED = {
    "JetMoE": ("tokens sorted by expert a second time", r"was lost in (view|split)"),
    "Longformer": STRIDED,
    "LED": STRIDED,
    "TimeSformer": ("takes class tokens from rows of other samples", r"was lost in cat"),
    "CLIP, contrastive loss": CONTRASTED,
    "CLIP, contrastive loss, `logit_scale` frozen": CONTRASTED,
}


# --- the page -----------------------------------------------------------------------------------------------------------------

HEAD = """# Models

## Hugging Face

Unmodified models of `transformers` {transformers} and adapters of `peft` {peft}, with tiny random configurations (one to three layers,
8 to 24 wide), in float64 with torch {torch} on the CPU: the per-sample gradients of every trainable parameter against a batch-of-one
loop, for three samples, and every quantity by `sw.verify`. Texts have different lengths, padded right or left. The losses are cross
entropies over each sample's own tokens, pixels or class, or sums over all outputs where a model has no such head.
`python -m tests.transformers_models` runs every line and writes this page; `tests/test_transformers.py` checks the same table.

**{exact} of {cases} cases ({names} models and adapters) are exact, {refused} are refused, none is wrong.**

Exact means a relative error below 1e-8; below 1e-5 where the model itself computes in float32, mostly routers (¹); below 1e-4 in
float32 (²). The error is relative to a parameter's largest entry, or to a millionth of the model's largest: a key bias has gradient
zero but for rounding.
"""
NOTES = """
³ torch 2.13 itself gives a wrong input gradient for batch normalization in evaluation on a batch of one with mixed memory layouts
(finite differences agree with `samplewise`), so the loop here runs two copies of the sample, and
`sw.verify` is left out.
"""


def _result(case: Case) -> str:
    mark = "²" if case.dtype == torch.float32 else "¹" if case.tolerance > FLOAT64 else "³" if case.copies > 1 else ""
    said = f"refused ({REFUSED[str(case)][0]})" if case.refused else f"exact{mark}"
    return f"{case.note}: {said}" if case.note else said


def rows() -> list[str]:
    """One row for every model: its variants and what came of them."""
    lines = ["| family | model | class | result |"]
    models: dict[tuple[str, str, str], list[str]] = {}
    for case in CASES:
        models.setdefault((case.family, case.name, case.architecture), []).append(_result(case))
    return lines + [f"| {family} | {name} | `{cls}` | {'; '.join(found)} |" for (family, name, cls), found in models.items()]


def write_page() -> None:
    """Run every case, and write the page if all turn out as the table says."""
    for case in CASES:
        found = outcome(case)
        if found != "exact" and not (case.refused and re.search(case.refused, found)):
            raise SystemExit(f"{case}: {found}")
        if found == "exact" and case.refused:
            raise SystemExit(f"{case}: exact now; take it off the refusals")
    table = rows()
    table.insert(1, "|---|---|---|---|")
    refused = sum(bool(case.refused) for case in CASES)
    head = HEAD.format(
        **{package: version(package) for package in ("transformers", "peft", "torch")},
        cases=len(CASES),
        exact=len(CASES) - refused,
        refused=refused,
        names=len(table) - 2,
    )
    PAGE.write_text("\n".join([head, *table, NOTES]), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_page()
