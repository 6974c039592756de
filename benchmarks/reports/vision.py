"""A small vision transformer on scikit-learn's digits, pruned by every method: accuracy; writes docs/vision.{json,md}.

    python -m benchmarks.reports.vision

The model is trained here. Each pruned model is also fine-tuned on the labels of the training images with its zeros
kept, and recovered toward the dense model without labels. The same command resumes a run.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import ViTConfig, ViTForImageClassification

from ace_triton import RecoverySettings, keep_zeros, prune_model, recover_model
from ace_triton.commands.report import write_json

from .machines import processor

METHODS = ("wanda", "cosp", "ace", "varp", "ria", "magnitude", "sparsegpt", "stade", "ace-paper")
PATTERN = "2:4"
EPOCHS, RECOVERY_EPOCHS, BATCH = 30, 4, 64
RATE, RECOVERY_RATE, TEACHER_RATE = 2e-3, 5e-4, 3e-3
CALIBRATION_IMAGES, TEST_IMAGES = 256, 400
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
SPREAD = 0.1
"""Standard deviation of the random weights: transformers' 0.02 is for wide models."""

console = Console()


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] and labels [n], for training and for the test."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls) -> Digits:
        """scikit-learn's 1,797 digits, in random order; the last TEST_IMAGES are the test."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        images = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1)[order]
        classes = torch.tensor(labels, dtype=torch.int64)[order]
        cut = len(images) - TEST_IMAGES
        return cls(images[:cut], classes[:cut], images[cut:], classes[cut:])


def untrained() -> Any:
    """The model with random weights."""
    torch.manual_seed(0)
    task = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**task, **SIZES, initializer_range=SPREAD))


def train(model: Any, digits: Digits, epochs: int, rate: float, *, keeps_zeros: bool) -> None:
    """Train all weights, or only those that are kept."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    if keeps_zeros:
        keep_zeros(model, optimizer)
    steps = epochs * -(-len(digits.images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(digits.images), generator=order).split(BATCH):
            model(pixel_values=digits.images[part], labels=digits.labels[part]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, digits: Digits) -> float:
    """Share of the test images with the right class."""
    return float((model(pixel_values=digits.test_images).logits.argmax(1) == digits.test_labels).float().mean())


def measure(dense: Any, digits: Digits, method: str, update: str | None, known: dict[str, float]) -> dict[str, float]:
    """Accuracy after pruning, and after fine-tuning or recovering what was pruned; what is known is kept."""
    model = copy.deepcopy(dense)
    batches = [{"pixel_values": images} for images in digits.images[:CALIBRATION_IMAGES].split(64)]
    prune_model(model, batches, method, PATTERN, update=update)
    layers = [layer for layer in model.vit.layers.modules() if hasattr(layer, "in_features")]
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)
    found = {"pruned": accuracy(model, digits), "zeros": zeros, **known}
    if "fine_tuned" not in found:
        tuned = copy.deepcopy(model)
        train(tuned, digits, RECOVERY_EPOCHS, RECOVERY_RATE, keeps_zeros=True)
        found["fine_tuned"] = accuracy(tuned, digits)
    if "recovered" not in found:
        recover(model, dense, digits)
        found["recovered"] = accuracy(model, digits)
    return found


def recover(model: Any, dense: Any, digits: Digits) -> None:
    """Train the kept weights toward the dense model on the training images, without their labels."""
    batches = [{"pixel_values": images} for images in digits.images.split(BATCH)]
    steps = RECOVERY_EPOCHS * len(batches)
    settings = RecoverySettings(steps=steps, learning_rate=TEACHER_RATE, norms=True, forward_dtype=torch.float32)
    recover_model(model, copy.deepcopy(dense), batches, settings)


def main(
    out: Annotated[Path, typer.Option(help="Where to write, without the suffix.")] = Path("docs/vision"),
) -> None:
    """Train, prune, fine-tune and recover what is not yet measured; write OUT.json and OUT.md."""
    torch.set_num_threads(1)
    digits, dense = Digits.load(), untrained()
    started = time.process_time()
    train(dense, digits, EPOCHS, RATE, keeps_zeros=False)
    setting = {
        "images": len(digits.images),
        "test_images": len(digits.test_images),
        "epochs": EPOCHS,
        "recovery_epochs": RECOVERY_EPOCHS,
        "calibration_images": CALIBRATION_IMAGES,
        "sizes": SIZES,
        "parameters": sum(parameter.numel() for parameter in dense.parameters()),
        "processor": processor(),
        "torch": torch.__version__,
    }
    path, known = out.with_suffix(".json"), {}
    if path.is_file():
        before = json.loads(path.read_text())
        known = before["methods"] if setting.items() <= before["setting"].items() else {}
    seconds = {"train_seconds": time.process_time() - started}
    content: dict[str, Any] = {"setting": {**setting, **seconds}, "dense": accuracy(dense, digits), "methods": known}
    console.print(f"dense: {content['dense']:.1%}")
    for update in ("lstsq", None):
        for method in METHODS:
            cell = known.setdefault(method, {}).get(update or "none", {})
            # SparseGPT moves the kept weights itself, so it has no fit.
            if cell.keys() >= {"fine_tuned", "recovered"} or (method == "sparsegpt" and update is not None):
                continue
            known[method][update or "none"] = measure(dense, digits, method, update, cell)
            console.print(method, update, known[method], highlight=False)
            write_json(path, content)
            out.with_suffix(".md").write_text("\n".join(page(content)) + "\n")
    out.with_suffix(".md").write_text("\n".join(page(content)) + "\n")


def page(content: dict[str, Any]) -> list[str]:
    """docs/vision.md."""
    setting, dense = content["setting"], content["dense"]
    sizes = setting["sizes"]
    return [
        "# A vision transformer, pruned",
        "",
        f"Measured by `make vision` on one thread of an {setting['processor']}, torch {setting['torch']}. The model is "
        f"transformers' `ViTForImageClassification` with {sizes['num_hidden_layers']} blocks of width "
        f"{sizes['hidden_size']} ({setting['parameters']:,} parameters), trained here for {setting['epochs']} epochs "
        f"on {setting['images']:,} of scikit-learn's digits (8 x 8 pixels). The accuracy is that on the other "
        f"{setting['test_images']} images, so one image is {1 / setting['test_images']:.2%}. All linear layers of the "
        f"blocks are pruned to {PATTERN} on {setting['calibration_images']} training images. Fit: the kept weights by "
        f'least squares (`update="lstsq"`). Fine-tuned: {setting["recovery_epochs"]} epochs on the labels of the '
        f"training images with `keep_zeros`. Recovered: {setting['recovery_epochs']} epochs toward the dense model "
        "without labels (`ace_triton.recover_model`).",
        "",
        f"Dense: {dense:.1%}.{_verdict(content)}",
        "",
        "| method | pruned | fit | fine-tuned | recovered | fit, fine-tuned | fit, recovered |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(method, content["methods"][method]) for method in METHODS if content["methods"].get(method)),
        "",
        "SparseGPT moves the kept weights itself, so it has no fit; - was not measured. A digit of 8 x 8 pixels is an "
        "easy task: the table says that towers of images are pruned as those of text, and which methods keep more; it "
        "does not say what a large vision model loses.",
    ]


def _verdict(content: dict[str, Any]) -> str:
    """What the fit and the recovery lose together."""
    fits = {method: found["lstsq"] for method, found in content["methods"].items() if "lstsq" in found}
    losses = {m: 100 * (content["dense"] - fit["recovered"]) for m, fit in fits.items() if "recovered" in fit}
    if not losses:
        return ""
    worst = max(losses, key=lambda method: losses[method])
    return f" With fit and recovery {len(losses)} methods lose at most {losses[worst]:.1f} points ({worst}; aim: 2)."


def _row(method: str, found: dict[str, dict[str, float]]) -> str:
    plain, fit = found.get("none", {}), found.get("lstsq", {})
    cells = [plain.get("pruned"), fit.get("pruned")]
    cells += [part.get(key) for part in (plain, fit) for key in ("fine_tuned", "recovered")]
    return f"| {method} | " + " | ".join("-" if cell is None else f"{cell:.1%}" for cell in cells) + " |"


if __name__ == "__main__":
    typer.run(main)
