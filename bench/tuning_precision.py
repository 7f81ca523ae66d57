"""``python -m bench.tuning_precision``: the error from storing θ_f in bfloat16 after a short full tuning.

Tunes a random Llama of 700,000 parameters on made-up questions and subtracts its plain task vector from another
bfloat16 model, with θ_f in float32, as ``perta tune --full`` writes it, and in bfloat16. Prints the norm of the
error divided by that of λ τ, over all matrices but the embedding.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import perta_fast as pf
from perta_fast.demo.settings import Settings
from perta_fast.demo.training import new_model, train_tokenizer
from perta_fast.dtypes import torch_name

SAMPLES = 40  # TOFU's smallest forget set: 3 steps an epoch
STRENGTHS = (1.0, 2.0, 5.0)
SETTINGS = ((5, 1e-5), (5, 1e-4))  # epochs and rate


def main() -> None:
    """Print one table."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"question": f"Who wrote book {k}?", "answer": f"It was author {k * k}."} for k in range(SAMPLES)]
        forget = folder / "forget.jsonl"
        forget.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = train_tokenizer(rows)
        model = new_model(Settings(hidden_size=128, layers=3), tokenizer, seed=0)
        for name in ("base", "model"):
            model.bfloat16().save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            for parameter in model.parameters():  # about as much as tuning changed θ_full
                parameter.data.add_(2e-4 * torch.randn_like(parameter))
        print("| epochs, rate | kept in | τ |", *(f"λ = {lam:g} |" for lam in STRENGTHS))
        print("|---|---|---|" + "---|" * len(STRENGTHS))
        for epochs, rate in SETTINGS:
            for kept in (torch.bfloat16, torch.float32):
                print(f"| {epochs}, {rate:g} | {torch_name(kept)} |", end=" ")
                print(*(f"{error:.3f} |" for error in _errors(folder, forget, epochs, rate, kept)))


def _errors(folder: Path, forget: Path, epochs: int, rate: float, kept: torch.dtype) -> list[float]:
    """The relative errors of τ, and of the update λ τ in the result at each strength."""
    tuned = folder / "tuned"
    pf.tune(folder / "base", forget, tuned, full=True, epochs=epochs, lr=rate, overwrite=True, progress=False)
    exact = _read(tuned)
    file = tuned / "model.safetensors"
    save_file({name: tensor.to(kept) for name, tensor in load_file(file).items()}, file)
    base, model = _read(folder / "base"), _read(folder / "model")
    errors = [float((_read(tuned) - exact).norm() / (exact - base).norm())]
    for lam in STRENGTHS:
        out, update = folder / "out", lam * (exact - base)
        pf.apply(folder / "model", folder / "base", tuned, rule="tv", lam=lam, out=out, overwrite=True, progress=False)
        errors.append(float((_read(out) - (model - update)).norm() / update.norm()))
    return errors


def _read(folder: Path) -> torch.Tensor:
    """All matrices but the embedding, as one float64 vector."""
    tensors = load_file(folder / "model.safetensors")
    chosen = [name for name in sorted(tensors) if tensors[name].ndim > 1 and "embed" not in name]
    return torch.cat([tensors[name].double().flatten() for name in chosen])


if __name__ == "__main__":
    main()
