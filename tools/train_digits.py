"""Train the small FLUX checkpoint that the demo and the tests run:
`integrations/harness/assets/digits_flux.safetensors`.

A `FluxTransformer2DModel` (hidden 128, 4 heads of 32, 2 double and 2 single blocks) learns scikit-learn's
bundled handwritten digits, enlarged to 16x16, as a rectified flow: `x_s = (1 - s) x + s e` and the model
predicts `e - x`. The class enters as a fixed random "prompt embedding", so the result runs in an unmodified
diffusers `FluxPipeline` without text encoders, and in everything built on it. 64 image tokens of 4 channels
(2x2 patches), 4 text tokens.

    python tools/train_digits.py --minutes 25        # prints the number of steps it took ...
    python tools/train_digits.py --steps N           # ... and this repeats that run

The result depends on the seed and on the number of steps only, up to the floating point of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 16  # pixels; the "latent" height and width of FluxPipeline
GRID = SIDE // 2  # FluxPipeline packs 2x2 pixels into one token: 8 x 8 tokens of 4 channels
TEXT_TOKENS = 4  # even, so that they split over two ranks
TEXT_DIM = 32
CLASSES = 10
MODEL_CONFIG = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "integrations/harness/assets/digits_flux.safetensors"
WARMUP_STEPS = 100
EMA_DECAY = 0.999


def digits() -> tuple[Tensor, Tensor]:
    """The data set: images `[1797, 1, 16, 16]` in [-1, 1] and labels `[1797]`."""
    bunch = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(-1, 1)
    return images, torch.tensor(bunch.target)


def pack(images: Tensor) -> Tensor:
    """`[B, 1, 16, 16]` -> tokens `[B, 64, 4]`, as `FluxPipeline._pack_latents` does."""
    b = images.shape[0]
    return images.view(b, GRID, 2, GRID, 2).permute(0, 1, 3, 2, 4).reshape(b, GRID * GRID, 4)


def unpack(tokens: Tensor) -> Tensor:
    """`[B, 64, 4]` -> images `[B, 1, 16, 16]`; the inverse of `pack`."""
    b = tokens.shape[0]
    return tokens.view(b, GRID, GRID, 2, 2).permute(0, 1, 3, 2, 4).reshape(b, 1, SIDE, SIDE)


def position_ids() -> tuple[Tensor, Tensor]:
    """Rotary positions of the image tokens `[64, 3]` (0, row, column) and of the text tokens `[4, 3]`
    (zeros).
    """
    image = torch.zeros(GRID * GRID, 3)
    image[:, 1] = torch.arange(GRID * GRID) // GRID
    image[:, 2] = torch.arange(GRID * GRID) % GRID
    return image, torch.zeros(TEXT_TOKENS, 3)


def class_embeddings(seed: int) -> tuple[Tensor, Tensor]:
    """Fixed random prompt embeddings `[10, 4, 32]` and pooled embeddings `[10, 32]`, exact in fp16."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randn(CLASSES, TEXT_TOKENS, TEXT_DIM, generator=g)
    pooled = torch.randn(CLASSES, TEXT_DIM, generator=g)
    return prompt.half().float(), pooled.half().float()


class Schedule:
    """Learning rate: linear warm-up, flat for three quarters of the run, cosine to zero over the last
    quarter.

    Flat first, so that a run limited by time can fix its length when three quarters of the time are gone, and
    a run of that length given by `--steps` goes through exactly the same rates.
    """

    def __init__(self, peak: float, steps: int | None) -> None:
        self.peak = peak
        self.quarter = None if steps is None else max(1, steps // 4)

    def fix_length(self, step: int) -> None:
        """Make `step` (rounded up to a multiple of 3) the end of the flat part."""
        self.quarter = max(1, -(-step // 3))

    @property
    def steps(self) -> int | None:
        return None if self.quarter is None else 4 * self.quarter

    def rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        if self.quarter is None or step < 3 * self.quarter:
            return self.peak * warm
        done = (step - 3 * self.quarter) / self.quarter
        return self.peak * warm * (0.5 + 0.5 * math.cos(math.pi * done))


def batches(images: Tensor, labels: Tensor, size: int, g: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Endless `(x_s [B, 64, 4], target [B, 64, 4], s [B], class [B])`, s logit-normal, every epoch
    shuffled.
    """
    tokens = pack(images)
    while True:
        order = torch.randperm(len(tokens), generator=g)
        for index in order.split(size):
            if len(index) < size:
                break
            x = tokens[index]
            noise = torch.randn(x.shape, generator=g)
            s = torch.sigmoid(torch.randn(size, generator=g))
            mix = s[:, None, None]
            yield (1 - mix) * x + mix * noise, noise - x, s, labels[index]


@torch.no_grad()
def sample(model: torch.nn.Module, prompt: Tensor, pooled: Tensor, classes: Tensor, seed: int) -> Tensor:
    """28 Euler steps for `classes [N]` -> images `[N, 16, 16]` in [0, 1]."""
    image_ids, text_ids = position_ids()
    z = torch.randn(len(classes), GRID * GRID, 4, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.linspace(1, 0, 29)
    for now, after in pairwise(sigmas):
        velocity = model(
            hidden_states=z,
            encoder_hidden_states=prompt[classes],
            pooled_projections=pooled[classes],
            timestep=now.expand(len(classes)),
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        z = z + (after - now) * velocity
    return (unpack(z)[:, 0].clamp(-1, 1) + 1) / 2


def train(args: argparse.Namespace) -> tuple[FluxTransformer2DModel, int]:
    """Train, return the model with its averaged (EMA) weights and the number of steps taken."""
    torch.manual_seed(args.seed)
    images, labels = digits()
    prompt, pooled = class_embeddings(args.seed)
    image_ids, text_ids = position_ids()
    model = FluxTransformer2DModel(**MODEL_CONFIG)
    weights = list(model.parameters())
    ema = [w.detach().clone() for w in weights]
    print(f"{sum(w.numel() for w in weights) / 1e6:.2f} M parameters", flush=True)

    schedule = Schedule(args.lr, args.steps)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    stream = batches(images, labels, args.batch, torch.Generator().manual_seed(args.seed + 1))
    start = time.monotonic()
    smooth, step = 0.0, 0
    while schedule.steps is None or step < schedule.steps:
        if schedule.steps is None and time.monotonic() - start > 0.75 * 60 * args.minutes:
            schedule.fix_length(step)
            print(f"{schedule.steps} steps fit", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        x, target, s, classes = next(stream)
        predicted = model(
            hidden_states=x,
            encoder_hidden_states=prompt[classes],
            pooled_projections=pooled[classes],
            timestep=s,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(predicted, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(ema, weights, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        smooth += (loss.item() - smooth) * max(0.01, 1 / step)
        if step % args.log_every == 0:
            passed = time.monotonic() - start
            print(f"step {step}  loss {smooth:.4f}  {passed:.0f} s  {passed / step:.3f} s/step", flush=True)

    with torch.no_grad():
        for weight, mean in zip(weights, ema, strict=True):
            weight.copy_(mean)
    return model.eval(), step


def save(model: FluxTransformer2DModel, steps: int, args: argparse.Namespace) -> None:
    """Write weights and embeddings as fp16 safetensors; everything else goes into the metadata."""
    prompt, pooled = class_embeddings(args.seed)
    tensors = {f"transformer.{k}": v.half().contiguous() for k, v in model.state_dict().items()}
    tensors |= {"prompt_embeds": prompt.half(), "pooled_prompt_embeds": pooled.half()}
    options = f"--steps {steps} --seed {args.seed} --batch {args.batch} --lr {args.lr}"
    command = f"python tools/train_digits.py {options}"
    metadata = {
        "format": "pt",
        "model": "diffusers.FluxTransformer2DModel",
        "config": json.dumps(MODEL_CONFIG),
        "data": "sklearn.datasets.load_digits, enlarged to 16x16 (bicubic), range [-1, 1]",
        "image_side": str(SIDE),
        "seed": str(args.seed),
        "steps": str(steps),
        "command": command,
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, metadata=metadata)
    print(
        f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {steps} steps; again with: {command}",
        flush=True,
    )


def report(model: FluxTransformer2DModel, args: argparse.Namespace) -> None:
    """Let a classifier trained on the same data read 200 samples; draw the first 40 when asked to."""
    from sklearn.svm import SVC

    images, labels = digits()
    prompt, pooled = class_embeddings(args.seed)
    classes = torch.arange(CLASSES).repeat(20)
    made = sample(model, prompt, pooled, classes, seed=args.seed + 2)
    reader = SVC(gamma="scale", C=10).fit((images.flatten(1) + 1).numpy() / 2, labels.numpy())
    right = (torch.as_tensor(reader.predict(made.flatten(1).numpy())) == classes).float().mean()
    print(f"a support vector machine reads {right:.1%} of 200 samples as the digit asked for", flush=True)
    if args.sheet:
        from PIL import Image

        sheet = made[:40].view(4, CLASSES, SIDE, SIDE).permute(0, 2, 1, 3).reshape(4 * SIDE, CLASSES * SIDE)
        picture = Image.fromarray((sheet * 255).round().byte().numpy())
        picture.resize((CLASSES * SIDE * 6, 4 * SIDE * 6), Image.Resampling.NEAREST).save(args.sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small FLUX model that draws digits.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=25.0, help="train about this long (default 25)")
    length.add_argument("--steps", type=int, help="train exactly this many steps (a multiple of 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--sheet", type=Path, help="also write a PNG of 40 samples here")
    args = parser.parse_args()
    if args.steps is not None and (args.steps < 4 or args.steps % 4):
        parser.error("--steps must be a positive multiple of 4")
    torch.set_num_threads(args.threads)
    model, steps = train(args)
    # What is reported is what the file holds: the weights after rounding to fp16.
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    save(model, steps, args)
    report(model, args)


if __name__ == "__main__":
    main()
