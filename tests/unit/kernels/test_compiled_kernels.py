"""Attention and int4 kernels compiled, without a GPU, for the chips that they are meant for.

A launch is recorded with the arguments that it would have, and compiled for sm_80, sm_89 and sm_90: so an instruction
that a chip lacks, or more shared memory than it has, is seen on any machine. Not whether it is right or fast.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

INSIDE = "VIT_EFFICIENT_COMPILES"
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that one program may have
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int8: "i8", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(INSIDE in os.environ, reason="this is the process that compiles")
def test_in_a_process_that_interprets_nothing() -> None:
    """Another test of the same run may have switched Triton's interpreter on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {INSIDE: "1"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((arguments, options))


def compiled(recorder: Recorder, capability: int) -> Any:
    """The kernel for `capability`, from the only launch that was recorded."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_for
    from triton.tools.tensor_descriptor import TensorDescriptor

    ((arguments, options),) = recorder.calls
    given = dict(zip((p.name for p in recorder.kernel.params), arguments, strict=False))
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(recorder.kernel.params):
        value = given[parameter.name] if parameter.name in given else options.pop(parameter.name)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(str(side) for side in value.block_shape)
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        else:
            kinds = {Tensor: "*" + TYPES[value.dtype] if isinstance(value, Tensor) else "", float: "fp32", int: "i32"}
            signature[parameter.name] = kinds[type(value)]
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(recorder.kernel, signature, constants, hints)
    return compile_for(source, target=GPUTarget("cuda", capability, 32), options=options)


def serialized(ptx: str, folder: Path) -> bool:
    """Whether the assembler lets only one of Hopper's matrix instructions be in flight, and says so."""
    from triton.backends.nvidia.compiler import get_ptxas

    file = folder / "kernel.ptx"
    file.write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(file), "-o", str(folder / "kernel.cubin")]
    return "are serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def inside(test: Any) -> Any:
    return pytest.mark.skipif(INSIDE not in os.environ, reason="compiled in a process of its own")(test)


def attention(monkeypatch: pytest.MonkeyPatch, capability: int, form: str, tokens: int, width: int) -> Recorder:
    from vit_efficient.kernels import attention_launch, tuning
    from vit_efficient.kernels.fp8_attention import triton as fp8
    from vit_efficient.kernels.int8_attention import triton as int8

    monkeypatch.setattr(tuning, "chip_of", lambda device: ("none", f"sm_{capability}"))
    tuning._chip.cache_clear()
    recorder = Recorder(attention_launch.attend_kernel)
    monkeypatch.setattr(attention_launch, "attend_kernel", recorder)
    monkeypatch.setattr(attention_launch, "operands_kernel", Recorder(attention_launch.operands_kernel))
    hopper = capability == 90
    launch = partial(attention_launch.attend, descriptors=hopper, scratch=hopper)
    for module in (int8, fp8):
        monkeypatch.setattr(module, "launch", launch)
    q, k, v = torch.empty(1, tokens, 3, 2, width, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    last = (None, torch.bfloat16)
    if form.startswith("int8"):
        _, values, keys = form.split()
        int8.attend(q, k, v, None, None, None, 0.125, values, keys, *last)
    else:
        fp8.attend(q, k, v, 0.125, True, form.split()[1], *last)
    tuning._chip.cache_clear()
    return recorder


INT8 = ("int8 float token", "int8 float block", "int8 int8 token")
FP8 = ("int8 fp8 block", "fp8 float", "fp8 fp8")


@inside
@pytest.mark.parametrize(("tokens", "width"), [(63, 64), (577, 64), (1024, 64), (577, 80), (577, 128)])
@pytest.mark.parametrize("form", INT8[1:] + FP8)
def test_attention_on_hopper(
    form: str, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = compiled(attention(monkeypatch, 90, form, tokens, width), 90)
    ptx = made.asm["ptx"]
    assert "s32.s8.s8" in ptx if form.startswith("int8") else "f32.e4m3.e4m3" in ptx
    assert "f32.e4m3.e4m3" in ptx or "fp8" not in form
    assert "mma.sync" not in ptx  # the slower instructions of older chips
    assert made.metadata.shared <= SHARED_MEMORY[90]
    if tokens >= 577 and width == 64:
        assert not serialized(ptx, tmp_path)


@inside
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("capability", "form"), [(80, INT8[2]), (89, INT8[2]), *((89, form) for form in FP8)])
def test_attention_on_ampere_and_ada(capability: int, form: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(attention(monkeypatch, capability, form, 577, width), capability)
    assert "s32.s8.s8" in made.asm["ptx"] or form.startswith("fp8")
    assert made.metadata.shared <= SHARED_MEMORY[capability]


@inside
@pytest.mark.parametrize("rows", [1, 197, 5000])
@pytest.mark.parametrize("activations", ["none", "token"])
@pytest.mark.parametrize(("capability", "group"), [(80, 128), (89, 128), (90, 32), (90, 128)])
def test_int4(
    capability: int, group: int, activations: str, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vit_efficient.kernels import tuning
    from vit_efficient.kernels.int4_linear import triton as int4

    monkeypatch.setattr(tuning, "chip_of", lambda device: ("none", f"sm_{capability}"))
    tuning._chip.cache_clear()
    recorder = Recorder(int4.int4_kernel)
    monkeypatch.setattr(int4, "int4_kernel", recorder)
    monkeypatch.setattr(int4, "add_parts_kernel", Recorder(int4.add_parts_kernel))
    monkeypatch.setattr(int4, "quantize", lambda x, form, scale: (x.to(torch.int8), torch.ones(x.shape[0], 1)))
    x, packed = torch.zeros(rows, 1024, dtype=torch.bfloat16), torch.zeros(1024, 512, dtype=torch.uint8)
    scale = torch.ones(1024, 1024 // group, dtype=torch.bfloat16)
    int4.int4_linear(x, packed, scale, scale.to(torch.uint8), scale[:, 0], group, activations, torch.bfloat16)
    tuning._chip.cache_clear()
    made = compiled(recorder, capability)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    if capability == 90:
        assert "wgmma" in made.asm["ptx"]
        assert not serialized(made.asm["ptx"], tmp_path)


@inside
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", ["gelu", "heads first", "tokens first"])
def test_gradients_with_their_sums(op: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_efficient.kernels.bias_gradient import triton as kernels

    monkeypatch.setattr(kernels, "processors", lambda device, elsewhere: 132)
    name = "_gelu_kernel" if op == "gelu" else "_heads_kernel"
    recorder = Recorder(getattr(kernels, name))
    monkeypatch.setattr(kernels, name, recorder)
    if op == "gelu":
        kernels.gelu_gradient(*torch.empty(2, 788, 4096, dtype=torch.bfloat16).unbind(0))
    else:
        shape = (4, 16, 197, 64) if op == "heads first" else (4, 197, 16, 64)
        given = torch.empty(3, *shape, dtype=torch.bfloat16)
        kernels.heads_gradient(*(given if op == "heads first" else given.transpose(2, 3)).unbind(0))
    made = compiled(recorder, capability)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    assert "ld.global.v4" in made.asm["ptx"]  # 16 bytes at once
    assert "st.global.v4" in made.asm["ptx"]


@inside
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_of_attention(first: bool, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vit_efficient.kernels.attention_gradient import triton as kernels

    recorder = Recorder(kernels._kernel)
    monkeypatch.setattr(kernels, "_kernel", recorder)
    q, k, v = torch.empty(4, 197, 3, 16, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    grad, out = torch.empty(2, 4, 197, 16, 64, dtype=torch.bfloat16).transpose(2, 3).unbind(0)
    kernels.attention_gradient(grad, q, k, v, out, torch.empty(4, 16, 197, 1), 0.125, first=first)
    made = compiled(recorder, capability)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    if capability == 90:
        assert "wgmma" in made.asm["ptx"]
        assert not serialized(made.asm["ptx"], tmp_path)
