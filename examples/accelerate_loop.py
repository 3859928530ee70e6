"""diffkern inside a loop of Hugging Face Accelerate: model object, averages and data of ours, everything else theirs.

accelerate launch examples/accelerate_loop.py --iterations 200
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import diffkern
from diffkern.data import Stream, loader, open_images
from diffkern.nn import UNet, preset
from diffkern.train import Averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    images = open_images("digits")
    diffusion = diffkern.Diffusion(UNet(preset("digits")), diffkern.cosine(), "eps", drop=0.1)
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    wrapped, optimizer = accelerator.prepare(diffusion, optimizer)
    averages = Averages(accelerator.unwrap_model(wrapped))
    batches = loader(images, Stream(len(images), seed=0), batch=options.batch, seed=0)
    for step, micro_batches in zip(range(1, options.iterations + 1), batches, strict=False):
        for part in micro_batches:  # this process's share of the batch
            x0, labels, seeds = (value.to(accelerator.device) for value in (part.x0, part.labels, part.seeds))
            with accelerator.autocast():
                loss = wrapped(x0, cond=labels, seeds=seeds)
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(step)
        if step % 50 == 0 or step == options.iterations:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
