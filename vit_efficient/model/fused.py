"""Deployed transformer blocks that quantize each tensor once, where it is made.

norm -> codes -> qkv -> attention -> codes -> proj + layer scale + residual -> norm -> codes -> fc1 + GELU + codes ->
fc2 + layer scale + residual, each arrow between codes a kernel on a GPU. `fuse_blocks` puts such blocks in place of
timm's, in memory, after a deployed model is loaded. Parameters, buffers and their names stay as they are; so does what
a file of the model holds. The arithmetic is that of the layers (`quantization.fused_linear`).

Shapes: B batch, N tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, GluMlp, LayerScale, Mlp, SwiGLU
from torch import Tensor, nn

from vit_efficient.attention.modules import Arguments, SelfAttention
from vit_efficient.errors import UserError
from vit_efficient.kernels.int8_linear.op import output_dtype
from vit_efficient.model.fuse_report import FuseReport
from vit_efficient.model.stochastic_depth import BLOCKS, is_of_training
from vit_efficient.quantization.fp8_attention import Fp8Attend
from vit_efficient.quantization.fused_attention import attention_operands
from vit_efficient.quantization.fused_linear import Codes, FusedLinear, view
from vit_efficient.quantization.fused_norm import NormCodes, SharedNormCodes
from vit_efficient.quantization.int8_attention import Int8Attend

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FusedBlock(nn.Module):
    """A block of timm's in evaluation, with the same parameters, buffers and submodules under the same names.

    Make one with `fuse_blocks`.
    """

    attn: SelfAttention
    mlp: Any

    def __init__(self, block: nn.Module, views: dict[str, FusedLinear]) -> None:
        super().__init__()
        self.held = (block,)  # in a tuple: its children are this block's
        self._parameters.update(block._parameters)
        self._buffers.update(block._buffers)
        self._modules.update(block._modules)
        for name in HOOKS:  # of the block itself
            setattr(self, name, getattr(block, name))
        self.views = views
        self.readers = [name for name in ("qkv", *PROJECTIONS, "gate") if f"attn.{name}" in views]
        self.widening = [name for name in ("fc1", "fc1_g", "fc1_x") if f"mlp.{name}" in views]
        entering = [views[f"attn.{name}"] for name in self.readers], [views[f"mlp.{name}"] for name in self.widening]
        self.attn_input = SharedNormCodes(block.get_submodule("norm1"), entering[0])
        self.attn_output = NormCodes(getattr(self.attn, "norm", None) or nn.Identity(), views["attn.proj"])
        self.mlp_input = SharedNormCodes(block.get_submodule("norm2"), entering[1])
        self.mlp_output = NormCodes(self.mlp.norm, views["mlp.fc2"])
        self.register_load_state_dict_post_hook(_fold)
        self.train(block.training)

    @property
    def original(self) -> nn.Module:
        """timm's block, with what this one has now."""
        (block,) = self.held
        for name in ("_parameters", "_buffers", "_modules"):
            now = getattr(self, name)
            getattr(block, name).update({key: now[key] for key in getattr(block, name)})
        return block.train(self.training)

    def fold(self) -> None:
        """Take what was loaded into the norms."""
        for module in self.modules():
            if isinstance(module, NormCodes):
                module.fold()

    def forward(self, x_BND: Tensor, **inputs: Any) -> Tensor:
        """The block. `inputs` are what timm's passes on to its attention (rope, attn_mask, shared biases).

        Raises:
            UserError: the model is in training mode.
        """
        if self.training:
            raise UserError(
                "A fused block has no training form, and the model is in training mode. Call model.eval(), or "
                "vit_efficient.model.fused.unfuse_blocks(model)."
            )
        return self._mlp(self._attention(x_BND, inputs))

    def _attention(self, x_BND: Tensor, inputs: dict[str, Any]) -> Tensor:
        attn = self.attn
        read, given = self.attn_input(x_BND), attn.arguments(x_BND, **inputs)
        if all(one is None for one in given.values()) and self._attends_codes():
            entering = self._attend_codes(read, output_dtype(x_BND))
        else:
            entering = self._attend(read, output_dtype(x_BND), given)
        return self.views["attn.proj"].add_output(entering, x_BND, self._layer_scale(1))

    def _attend(self, read: list[Codes], dtype: torch.dtype, given: Arguments) -> Codes:
        """Projections in `dtype`, attention by the backend, and the codes that enter the last projection."""
        attn, projected = self.attn, self._project(read, dtype)
        gate = projected.pop("gate", None)
        y_BND = attn.attend_heads(*attn.split_heads(*projected.values()), **given)
        if gate is None:
            return self.attn_output(y_BND)
        y_BND = y_BND if attn.norm is None else attn.norm(y_BND)
        return self.views["attn.proj"].codes(y_BND * gate.sigmoid(), self.attn_output.reciprocal)

    def _project(self, read: list[Codes], dtype: torch.dtype) -> dict[str, Tensor]:
        """What reads the input, in `dtype`, by name: (B, N, ...)."""
        projected = {}
        for name, codes in zip(self.readers, read, strict=True):
            bias, apart = self._bias(name)
            y = self.views[f"attn.{name}"].output(codes, dtype, bias)
            projected[name] = y if apart is None else y + apart.to(dtype)
        return projected

    def _attends_codes(self) -> bool:
        """Whether attention on codes can be called here, between the projections: nothing else lies between them."""
        attn, backend = self.attn, self.attn.backend
        return (
            isinstance(backend, (Int8Attend, Fp8Attend))
            and backend.direct
            and (attn.q_norm is None or (_is_identity(attn.q_norm) and _is_identity(attn.k_norm)))
            and attn.num_kv_heads == attn.num_heads
            and not any(self.views[f"attn.{name}"].grouped or self._bias(name)[1] is not None for name in self.readers)
            and "gate" not in self.readers
        )

    def _attend_codes(self, read: list[Codes], dtype: torch.dtype) -> Codes:
        """Projections, attention on codes, and the codes that enter the last projection."""
        attn, proj = self.attn, self.views["attn.proj"]
        backend: Any = attn.backend
        if backend.hands_codes:
            layers = [(self.views[f"attn.{name}"], self._bias(name)[0]) for name in self.readers]
            operands, rows = attention_operands(backend, layers, read, attn.num_heads, dtype)
        else:
            operands, rows = [*attn.split_heads(*self._project(read, dtype).values())], [None] * 3
        if attn.padding is not None:
            operands[1:] = attn.padding.readable(operands[1], operands[2], None, None)[:2]
            rows[1:] = [None if scale is None else scale[:, :, : operands[1].shape[2]] for scale in rows[1:]]
        # A given scale of the projection behind it: attention ends in that one's codes.
        ends_in = proj.input_scale if self._attention_apart() is None else None
        y_BHNE = backend.attend_direct(operands, rows, scale=attn.scale, out_scale=ends_in, dtype=dtype)
        y_BND = y_BHNE.transpose(1, 2).flatten(2)
        return self.attn_output(y_BND) if ends_in is None else Codes(y_BND, ends_in.reshape(1, 1))

    def _attention_apart(self) -> str | None:
        """Why attention cannot end in the codes of the last projection; None: it can."""
        proj = self.views["attn.proj"]
        if "gate" in self.readers:
            return "a gate multiplies what attention gives"
        if not self._attends_codes():
            return "attention ends in floating point"
        if not _is_identity(self.attn.norm):
            return "a norm lies between attention and it"
        form = getattr(self.attn.backend, "form", None)
        if proj.form != form or proj.input_scale is None:
            return f"{form} attention ends in {form} codes under a given scale only (hybrid and static have one)"
        return None if proj.plain_input else f"{form} attention ends in codes under a scale alone: no shift, no smooth"

    def _mlp_apart(self) -> str | None:
        """Why the wide layer cannot end in the codes of the narrow one; None: it can."""
        if not isinstance(self.mlp, Mlp):
            return "a gate multiplies what enters it"
        if not _is_gelu(self.mlp.act):
            return "no product ends in this activation"
        return self.views["mlp.fc1"].apart(self.views["mlp.fc2"])

    def passes(self) -> dict[str, str]:
        """Layers whose input a pass of its own quantizes on a GPU, and not the kernel that makes it; and why."""
        entering = [*self.attn_input.apart(), *self.mlp_input.apart()]
        names = [f"attn.{name}" for name in self.readers] + [f"mlp.{name}" for name in self.widening]
        reasons = dict(zip(names, entering, strict=True))
        straight = self.attn_output.identity or "gate" in self.readers
        reasons["attn.proj"] = self._attention_apart() if straight else self.attn_output.apart
        reasons["mlp.fc2"] = self._mlp_apart() if self.mlp_output.identity else self.mlp_output.apart
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _bias(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A bias that EVA and BEiT hold apart: as the projection's own, where it has none; or to be added after it."""
        apart = self.attn.separate_bias() if name == "qkv" else None
        return (apart, None) if self.views[f"attn.{name}"].layer.bias is None else (None, apart)

    def _mlp(self, x_BND: Tensor) -> Tensor:
        mlp, dtype, fc2 = self.mlp, output_dtype(x_BND), self.views["mlp.fc2"]
        codes = self.mlp_input(x_BND)
        wide = [self.views[f"mlp.{name}"] for name in self.widening]
        if _is_gelu(mlp.act) and isinstance(mlp, Mlp):
            if isinstance(mlp.norm, nn.Identity):
                entering = wide[0].output_gelu_codes(codes[0], fc2, dtype, self.mlp_output.reciprocal)
                return fc2.add_output(entering, x_BND, self._layer_scale(2))
            h = wide[0].output_gelu(codes[0], dtype)
        else:
            h = self._activate([layer.output(one, dtype) for layer, one in zip(wide, codes, strict=True)])
        return fc2.add_output(self.mlp_output(h), x_BND, self._layer_scale(2))

    def _activate(self, projected: list[Tensor]) -> Tensor:
        """The activation as a pass of its own: gated, or one that no product ends in."""
        mlp = self.mlp
        if isinstance(mlp, SwiGLU):
            return mlp.act(projected[0]) * projected[1]
        if isinstance(mlp, GluMlp):
            first, second = projected[0].chunk(2, dim=-1)
            return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
        return mlp.act(projected[0])

    def _layer_scale(self, half: int) -> Tensor | None:
        """gamma (D,) of the attention's (1) or the MLP's (2) branch, or None."""
        scale = getattr(self, f"ls{half}", None)
        return scale.gamma if isinstance(scale, LayerScale) else getattr(self, f"gamma_{half}", None)

    def extra_repr(self) -> str:
        return f"fused {type(self.held[0]).__name__}"


def _fold(block: FusedBlock, _: Any) -> None:  # at the top of the module, so that models can be pickled
    block.fold()


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the erf form, which products end in."""
    return isinstance(act, GELU) or (isinstance(act, nn.GELU) and act.approximate == "none")


def fuse_blocks(model: nn.Module) -> FuseReport:
    """Put fused blocks in place of timm's, in place, wherever all linear layers of a block multiply codes.

    What a block has that the fused form does not know leaves that block as it is, and the report says why. For
    evaluation; `unfuse_blocks` takes it back. Do it after weights are loaded and before compilation.

    Args:
        model: deployed (`finalize`d or loaded from a model file), its attention swapped, its blocks in `blocks`.

    Raises:
        UserError: the model has no `blocks`.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Module):
        raise UserError(f"{type(model).__name__} has no `blocks`, so there is nothing to fuse.")
    report = FuseReport()
    for name, block in list(blocks.named_children()):
        full = f"blocks.{name}"
        if isinstance(block, FusedBlock):
            report.fused.append(full)
            report.passes[full] = block.passes()
            continue
        views = _read(block)
        if isinstance(views, str):
            report.left[full] = views
            continue
        fused = FusedBlock(block, views)
        setattr(blocks, name, fused)
        report.fused.append(full)
        report.passes[full] = fused.passes()
    return report


def unfuse_blocks(model: nn.Module) -> None:
    """Put timm's own blocks back, in place, with the weights that the fused ones have now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedBlock):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original)


def _read(block: nn.Module) -> dict[str, FusedLinear] | str:
    """The layers of a block as a fused one calls them, by name; or, in words, why it cannot be fused."""
    if type(block) not in BLOCKS:
        return f"{type(block).__name__} is not a block of a pre-normed attention and a pre-normed MLP"
    attn: Any = block.get_submodule("attn")
    mlp: Any = block.get_submodule("mlp")
    if not isinstance(attn, SelfAttention):
        return f"its attention is a {type(attn).__name__}, whose parts cannot be called apart"
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"its MLP is a {type(mlp).__name__}"
    if any(_has_hooks(inner) for inner in block.modules() if inner is not block):
        return "its parts have forward hooks, which a fused block would not call"
    names = [f"attn.{name}" for name in ("qkv", *PROJECTIONS, "gate", "proj") if _child(attn, name)]
    names += [f"mlp.{name}" for name in ("fc1", "fc1_g", "fc1_x", "fc2") if _child(mlp, name)]
    views: dict[str, FusedLinear] = {}
    for name in names:
        found = view(block.get_submodule(name))
        if isinstance(found, str):
            return f"{name} {found}"
        views[name] = found
    return views


def _has_hooks(module: nn.Module) -> bool:
    before = module._forward_pre_hooks.values()
    return bool(module._forward_hooks) or any(not is_of_training(hook) for hook in before)


def _child(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)
