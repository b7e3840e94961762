"""Train a small DiT on two photographs and record a trace of it, for `compactdist evaluate`.

    python tools/record_photos.py --out benchmarks/traces/photos_dit.safetensors

The second committed trace, of a model that is unlike that of the first: `DiTTransformer2DModel` of diffusers (hidden
144, 2 heads of 72, 6 blocks; no rotary positions, no norm of queries and keys), 64 x 64 pictures in colour as 256
patches of 4 x 4. It learns crops of the two photographs that scikit-learn ships, as a rectified flow:
`x_s = (1 - s) x + s e`, and the model predicts `e - x`. Then it draws one picture of each photograph's kind in 28 Euler
steps, and the keys of a block in the middle and the values of a late one are kept, as bfloat16: of both pictures the
first half of the tokens, which is what rank 0 of two sends in ring attention. Tensors `[28, 2 * 128, 144]`.

The result depends on seed, batch, learning rate and number of training steps only, up to the floating point of the
machine. About five minutes on one core that has nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from sklearn.datasets import load_sample_images
from torch import Tensor

from compactdist import __version__
from compactdist.observe.trace import save_trace

SIDE = 64  # pixels
MODEL_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "in_channels": 3,
    "num_layers": 6,
    "sample_size": SIDE,
    "patch_size": 4,
    "num_embeds_ada_norm": 2,  # the photographs
}
SHRUNK = (1, 2, 3)  # crops are cut from the photographs made smaller by these factors
STEPS = 28
SITES = {"k/transformer_blocks.2.attn1": (2, "to_k"), "v/transformer_blocks.4.attn1": (4, "to_v")}
WARMUP_STEPS = 50
TRAIN_STEPS = 450


def photographs() -> list[list[Tensor]]:
    """Each photograph in all sizes: `[3, height, width]` in [-1, 1]."""
    whole = [torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1 for image in load_sample_images().images]
    return [[F.avg_pool2d(image, shrunk)[0] for shrunk in SHRUNK] for image in whole]


def crops(photos: list[list[Tensor]], count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops `[count, 3, SIDE, SIDE]`, every second one mirrored on average, and the photographs they are of."""
    labels = torch.randint(len(photos), (count,), generator=g)
    made = []
    for label in labels.tolist():
        image = photos[label][int(torch.randint(len(SHRUNK), (), generator=g))]
        top, left = (int(torch.randint(n - SIDE + 1, (), generator=g)) for n in image.shape[1:])
        crop = image[:, top : top + SIDE, left : left + SIDE]
        made.append(crop.flip(-1) if torch.rand((), generator=g) < 0.5 else crop)
    return torch.stack(made), labels


def velocity(model: DiTTransformer2DModel, x: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """What the model takes for `e - x` at times `s [B]` in [0, 1]."""
    return model(x, timestep=1000 * s, class_labels=labels, return_dict=False)[0]


def train(args: argparse.Namespace) -> tuple[DiTTransformer2DModel, float]:
    """Train; return the model and the mean loss of the last tenth of the steps."""
    torch.manual_seed(args.seed)
    model, photos = DiTTransformer2DModel(**MODEL_CONFIG).train(), photographs()
    weights = list(model.parameters())
    print(f"{sum(w.numel() for w in weights) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    g = torch.Generator().manual_seed(args.seed + 1)
    start, losses = time.monotonic(), []
    for step in range(args.train_steps):
        done = step / args.train_steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * done))
        x, labels = crops(photos, args.batch, g)
        noise = torch.randn(x.shape, generator=g)
        s = torch.sigmoid(torch.randn(args.batch, generator=g))
        mix = s[:, None, None, None]
        loss = F.mse_loss(velocity(model, (1 - mix) * x + mix * noise, s, labels), noise - x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % args.log_every == 0:
            recent, passed = losses[-args.log_every :], time.monotonic() - start
            print(f"step {step + 1}  loss {sum(recent) / len(recent):.4f}  {passed:.0f} s", flush=True)
    last = losses[-max(1, len(losses) // 10) :]
    return model.eval(), sum(last) / len(last)


@torch.no_grad()
def draw(model: DiTTransformer2DModel, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw a picture of each kind: pictures `[2, 3, SIDE, SIDE]`, and by site what rank 0 of two would send.

    Activations have the shape `[STEPS, 2 * tokens / 2, channels]`, bfloat16.
    """
    kept: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def keep(site: str, x: Tensor) -> None:
        half = x[:, : x.shape[1] // 2]
        kept[site].append(half.reshape(-1, x.shape[2]).to(torch.bfloat16))

    hooks = [
        getattr(model.transformer_blocks[block].attn1, name).register_forward_hook(
            lambda module, inputs, output, site=site: keep(site, output)
        )
        for site, (block, name) in SITES.items()
    ]
    labels = torch.arange(MODEL_CONFIG["num_embeds_ada_norm"])
    x = torch.randn(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for now, after in pairwise(torch.linspace(1, 0, STEPS + 1)):
        x = x + (after - now) * velocity(model, x, now.expand(len(labels)), labels)
    for hook in hooks:
        hook.remove()
    return x, {site: torch.stack(entries) for site, entries in kept.items()}


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Write the pictures side by side as a PNG, four times as large."""
    from PIL import Image

    sheet = ((pictures.clamp(-1, 1) + 1) * 127.5).byte().permute(2, 0, 3, 1).reshape(SIDE, -1, 3)
    picture = Image.fromarray(sheet.numpy())
    picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small DiT on two photographs and record a trace of it.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--sheet", type=Path, help="also write the pictures here, a PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, loss = train(args)
    pictures, tensors = draw(model, args.seed + 2)
    options = f"--train-steps {args.train_steps} --seed {args.seed} --batch {args.batch} --lr {args.lr}"
    metadata = {
        "format": "compactdist trace 1",
        "model": "diffusers.DiTTransformer2DModel",
        "config": json.dumps(MODEL_CONFIG),
        "data": "crops of sklearn.datasets.load_sample_images, 64x64, range [-1, 1]",
        "seed": str(args.seed),
        "train_steps": str(args.train_steps),
        "loss": f"{loss:.4f}",
        "steps": str(STEPS),
        "kept": "both pictures, the first half of the tokens",
        "made by": f"python tools/{Path(__file__).name} {options}",
        "compactdist": __version__,
        "torch": torch.__version__,
        "sites": json.dumps(list(tensors)),
    }
    save_trace(args.out, tensors, metadata=metadata)
    for site, x in tensors.items():
        print(site, list(x.shape))
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    if args.sheet:
        save_sheet(pictures, args.sheet)


if __name__ == "__main__":
    main()
