"""The teacher: what it adds to the loss, what it must not touch, and which teachers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.machine import Machine
from vit_efficient.model.backbone import create_backbone
from vit_efficient.model.build import Built, build_model
from vit_efficient.model.distill import Teacher, build_teacher, find_teacher, soft_losses
from vit_efficient.model.gelu import CompiledGELU
from vit_efficient.model.module import ViTModule
from vit_efficient.model.patches import PatchConv2d
from vit_efficient.quantization.base import DistillConfig
from vit_efficient.quantization.deploy import deployed_state
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.load import dump_recipe, load_recipe
from vit_efficient.recipe.schema import ModelConfig, OptimConfig, Recipe

KWARGS = "{patch_size: 8, depth: 1, embed_dim: 24, num_heads: 3}"
CLASSES = 10


def recipe_of(*overrides: str, variant: str = "int8_sdpa", kwargs: str = KWARGS) -> Recipe:
    words = [f"model.kwargs={kwargs}", "strategy.accelerator=cpu", *overrides]
    return resolve(load_recipe(variant, words).recipe, Machine(cores=2))[0]


def write_weights(path: Path, *, classes: int = CLASSES, size: int = 32, **kwargs: Any) -> Path:
    """Weights of a small random model, as a run in full precision would leave them."""
    own = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3, **kwargs}
    torch.manual_seed(1)
    model = create_backbone(ModelConfig(name="vit_tiny_patch16_224", image_size=size, kwargs=own), classes).model
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return path


def built(*overrides: str) -> tuple[Built, Teacher]:
    recipe = recipe_of(*overrides)
    student = build_model(recipe, CLASSES)
    teacher = build_teacher(recipe, student.image, CLASSES)
    assert teacher is not None
    return student, teacher


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_loss_is_the_divergence_of_the_tempered_answers(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).mul(3).unbind()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(soft_losses(student, teacher, temperature), by_hand.float(), rtol=1e-4, atol=1e-6)
    assert soft_losses(teacher, teacher, temperature).abs().max() < 1e-5


def test_gradients_keep_their_size_at_high_temperatures() -> None:
    """Equation 4 of the paper, times T^2: for a high T the gradient is that of matching centred logits."""
    student, teacher = torch.randn(2, 3, 4).unbind()
    student.requires_grad_(True)
    soft_losses(student, teacher, 1000.0).sum().backward()
    assert student.grad is not None
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(student.grad, centred.detach() / 4, rtol=0.02, atol=1e-3)


class Fixed(nn.Module):
    """Transforms that take a batch as it is."""

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return batch["image"], batch["target"]


class Place:
    """What `training_step` asks of a trainer."""

    world_size, accumulate_grad_batches = 2, 3


def module_of(model: nn.Module, teacher: Teacher | None) -> tuple[ViTModule, Place]:
    module = ViTModule(
        model, Fixed(), OptimConfig(lr=1e-3, epochs=1), lr=1e-3, num_classes=CLASSES, steps_per_epoch=1, teacher=teacher
    )
    place = Place()
    module.trainer = place  # type: ignore[assignment]
    return module.train(), place


def batch_of(images: Tensor, weight: Tensor, count: int) -> dict[str, Any]:
    """A micro-batch with mixed targets."""
    target = torch.linspace(0, 3, len(images) * CLASSES).sin().view(len(images), CLASSES).softmax(1)
    return {"image": images, "target": target, "weight": weight, "count": count, "step": 0, "micro": 0}


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))


def teacher_of(alpha: float) -> Teacher:
    return Teacher(linear(5), DistillConfig(alpha=alpha, temperature=3.0), source="here", digest="a" * 64)


def test_weights_and_the_global_count_apply_to_both_parts() -> None:
    student, teacher = linear(4), teacher_of(0.25)
    module, place = module_of(student, teacher)
    images = torch.randn(4, 3, 2, 2)
    batch = batch_of(images, torch.tensor([1.0, 1.0, 1.0, 0.0]), 8)  # three of eight images, and a filler
    loss = module.training_step(batch, 0)
    hard_B = F.cross_entropy(student(images), batch["target"], reduction="none")
    soft_B = soft_losses(student(images), teacher.model(images), 3.0)
    scale = place.world_size * place.accumulate_grad_batches / 8
    torch.testing.assert_close(loss, scale * (0.75 * hard_B + 0.25 * soft_B)[:3].sum())
    torch.testing.assert_close(module.last_parts["hard"], scale * hard_B[:3].sum().detach())
    torch.testing.assert_close(module.last_parts["soft"], scale * soft_B[:3].sum().detach())
    assert not any(part.requires_grad for part in module.last_parts.values())


def gradients(teacher: Teacher | None, *, shuffled: bool = False) -> Tensor:
    student = linear(4)
    module, _place = module_of(student, teacher)
    torch.manual_seed(0)
    batch = batch_of(torch.randn(4, 3, 2, 2), torch.ones(4), 4)
    if shuffled:
        batch["target"] = batch["target"].roll(1, dims=0)
    module.training_step(batch, 0).backward()
    gradient = student[1].weight.grad  # type: ignore[index]
    assert isinstance(gradient, Tensor)
    return gradient


def test_alpha_runs_from_the_labels_alone_to_the_teacher_alone() -> None:
    assert torch.equal(gradients(teacher_of(0.0)), gradients(None))
    assert not torch.allclose(gradients(teacher_of(0.5)), gradients(None))
    assert torch.equal(gradients(teacher_of(1.0)), gradients(teacher_of(1.0), shuffled=True))
    assert not torch.equal(gradients(teacher_of(0.5)), gradients(teacher_of(0.5), shuffled=True))


# -- what it does not touch -------------------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_module(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "t.safetensors", drop_path_rate=0.5)
    student, teacher = built(f"quantization.distill.teacher={path}")
    with_teacher, _ = module_of(student.model, teacher)
    names = set(with_teacher.state_dict())
    without, _ = module_of(student.model, None)
    assert names == set(without.state_dict())
    assert not {id(p) for p in teacher.model.parameters()} & {id(p) for p in with_teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with_teacher.train()
    assert not any(module.training for module in teacher.model.modules())
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    state = torch.get_rng_state()
    soft = teacher.losses(with_teacher(images), images)
    assert torch.equal(torch.get_rng_state(), state)
    soft.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.model.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters())
    assert any(p.grad is not None for p in student.model.parameters())


def test_building_it_draws_none_of_the_runs_numbers(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "t.safetensors")
    recipe = recipe_of(f"quantization.distill.teacher={path}")
    student = build_model(recipe, CLASSES)
    state = torch.get_rng_state()
    build_teacher(recipe, student.image, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_has_the_fast_modules_that_its_student_has(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "t.safetensors")
    student, teacher = built(f"quantization.distill.teacher={path}")
    kinds = {type(module) for module in teacher.model.modules()}
    assert {CompiledGELU, PatchConv2d} <= kinds & {type(module) for module in student.model.modules()}


def test_half_precision_weights_are_what_autocast_makes_of_them(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "t.safetensors")
    images = torch.randn(2, 3, 32, 32)
    answers = []
    for precision in ("bf16", "fp32"):
        _, teacher = built(f"quantization.distill.teacher={path}", f"quantization.precision={precision}")
        with torch.autocast("cpu", torch.bfloat16):
            answers.append(teacher.logits(images))
    assert answers[0].dtype == torch.bfloat16
    assert torch.equal(*answers)


def test_a_changed_file_is_refused_when_resuming() -> None:
    teacher, other = teacher_of(0.5), teacher_of(0.5)
    module, _ = module_of(linear(4), teacher)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    other.digest = "b" * 64
    with pytest.raises(CheckpointError, match=r"bbbb.*aaaa"):
        module_of(linear(4), other)[0].on_load_checkpoint(checkpoint)


# -- which teachers there are -----------------------------------------------------------------------------------------


def test_base_is_where_the_run_starts_from(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "t.safetensors")
    recipe = recipe_of("quantization.distill={}", f"model.weights={path}")
    assert find_teacher(recipe) == str(path)
    student, teacher = built("quantization.distill={}", f"model.weights={path}", "quantization.keep=['*.qkv', head]")
    assert student.report.quantized  # the teacher is not
    assert torch.equal(teacher.model.head.weight, student.model.head.weight)
    assert find_teacher(recipe_of("quantization.distill={}", variant="int4_sdpa")) is None  # its base is trained first
    assert find_teacher(recipe_of("quantization.distill={}", variant="int4_sdpa"), base="b") == "b"
    assert find_teacher(recipe_of()) is None
    with pytest.raises(UserError, match=r"model\.weights"):
        find_teacher(recipe_of("quantization.distill={}"))


def test_a_runs_folder_says_which_model_it_is_of(tmp_path: Path) -> None:
    write_weights(tmp_path / "run" / "model.safetensors", depth=2, embed_dim=48)
    large = recipe_of(variant="fp32_sdpa", kwargs="{patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}")
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(large))
    student, teacher = built(f"quantization.distill.teacher={tmp_path / 'run'}")
    assert len(student.blocks) == 1
    assert len(teacher.model.blocks) == 2
    assert teacher.logits(torch.randn(1, 3, 32, 32)).shape == (1, CLASSES)
    assert teacher.source == str(tmp_path / "run" / "model.safetensors")


def quantized_weights(path: Path) -> Path:
    tensors, _ = deployed_state(build_model(recipe_of(), CLASSES).model)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (lambda folder: folder / "absent.safetensors", ["absent.safetensors", "no such file"]),
        (lambda folder: folder, ["neither model.safetensors nor a checkpoint"]),
        (lambda folder: write_weights(folder / "t.safetensors", classes=7), ["7 -> 10 classes", "10 classes"]),
        (lambda folder: write_weights(folder / "t.safetensors", size=48), ["6x6 -> 4x4", "32 px"]),
        (lambda folder: write_weights(folder / "t.safetensors", depth=2), ["does not fit", "full precision"]),
        (lambda folder: quantized_weights(folder / "q.safetensors"), ["weight_scale", "full precision"]),
    ],
    ids=["absent", "empty folder", "classes", "size", "other model", "quantized"],
)
def test_teachers_that_are_refused(make: Any, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        built(f"quantization.distill.teacher={make(tmp_path)}")
    for text in ("quantization.distill.teacher", *texts):
        assert text in str(caught.value)


def test_a_run_of_another_image_size_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "run" / "model.safetensors", size=48)
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe_of("model.image_size=48", variant="fp32_sdpa")))
    with pytest.raises(CheckpointError, match=r"48 px.*32 px"):
        built(f"quantization.distill.teacher={tmp_path / 'run'}")


@pytest.mark.parametrize("words", ["alpha=1.5", "alpha=-0.1", "temperature=0"])
def test_settings_that_are_refused(words: str) -> None:
    with pytest.raises(UserError, match=r"quantization\.distill"):
        recipe_of(f"quantization.distill.{words}")
