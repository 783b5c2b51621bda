"""How good digits are after ten minutes of training: lesson 06 beside two other libraries. A table, and JSON.

    python benchmarks/peers.py [--seconds 600] [--n 1000] [--only NAME …] [--device NAME] [--json FILE] [--quick]

Everybody has the same digits and the same seconds on the same processors. Model, loss, optimizer and learning rate are
each one's own. Those of denoising-diffusion-pytorch are its README's and its `Trainer`'s, with half the width and three
levels, since the pictures are 28×28 and not 128×128; and once more with ten times its learning rate, which so short a
training may need. That of diffusers is the MNIST model of Hugging Face's diffusion course, a plain `UNet2DModel`. All
draw n digits in 25 steps of DDIM. Then lesson 02's classifier reads them, from which nobody has learned, and FID in its
features is measured against 10,000 training digits. The floor is what as many test digits get.
"""
import argparse
import json
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import clock, goal, machine, print_goals

from sdcourse import digits
from sdcourse.data import digit_dataloaders
from sdcourse.metrics import evaluate, features, random_digits
from sdcourse.model import default_device

GUIDANCE, KEYS = 1.5, ('label_accuracy', 'fid')


def until(args, loader, step) -> int:
    "Call `step(images, labels)` with batch after batch until the seconds are over; how often that was"
    start, count = clock(args.device), 0
    while True:
        for images, labels in loader:
            if clock(args.device) - start > args.seconds: return count
            step(images, labels)
            count += 1


# ---- lesson 06

def lesson_06(args):
    "The recipe of lesson 06, its cycle of the learning rate measured in seconds: steps, and a function that draws"
    from fastai.callback.core import Callback, CancelFitException
    learn = digits._learner(128, 0, args.device, torch.bfloat16)
    start = clock(args.device)
    def before_batch(self):
        share = (clock(args.device) - start)/args.seconds
        if share > 1: raise CancelFitException
        self.learn.pct_train = share                                            # which the schedule looks at
    learn.dls.loaders = [learn.dls.train, []]                                    # nobody else validates
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(10_000, 2e-3, cbs=Callback(before_batch=before_batch))
    model, scheduler = learn.ema.average.eval(), digits.make_scheduler(**digits.SCHEDULER)
    def draw(labels, generator):
        scheduler.set_timesteps(args.steps)
        noise = torch.randn(len(labels), 4, 14, 14, generator=generator).to(args.device)
        *_, last = digits.denoise(model, scheduler, noise, labels, GUIDANCE)
        return last.xt
    return learn.ema.steps, count(model), draw


# ---- denoising-diffusion-pytorch

def lucidrains(args, lr=1e-4):
    "Its classifier-free guidance, its `Trainer`'s optimizer and average: steps, weights, and a function that draws"
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    unet = Unet(dim=32, dim_mults=(1, 2, 4), channels=1, num_classes=10)
    diffusion = GaussianDiffusion(unet, image_size=28, timesteps=1000, sampling_timesteps=args.steps,
                                  ddim_sampling_eta=0.)
    diffusion = diffusion.to(args.device)
    average = EMA(diffusion, beta=.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=lr, betas=(.9, .99))
    def step(images, labels):
        diffusion(images/2 + .5, classes=labels).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    steps = until(args, digit_dataloaders(32, device=args.device).train, step)
    def draw(labels, generator):
        torch.manual_seed(generator.initial_seed())                              # it takes no generator
        return average.ema_model.eval().sample(classes=labels, cond_scale=GUIDANCE, rescaled_phi=0.)*2 - 1
    return steps, count(unet), draw


# ---- diffusers

class Labelled(torch.nn.Module):
    "The MNIST model of Hugging Face's diffusion course (unit 2): the label's vector as four more channels"
    def __init__(self):
        super().__init__()
        import diffusers
        self.embedding = torch.nn.Embedding(10, 4)
        self.unet = diffusers.UNet2DModel(
            sample_size=28, in_channels=5, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 64),
            down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'))

    def forward(self, xt, t, labels):
        "The predicted noise, (b,1,28,28)"
        channels = self.embedding(labels)[:, :, None, None].expand(-1, -1, *xt.shape[2:])
        return self.unet(torch.cat([xt, channels], 1), t).sample


def hugging_face(args):
    "Its loop: steps, weights, and a function that draws"
    import diffusers
    config = dict(num_train_timesteps=1000, beta_schedule='squaredcos_cap_v2')
    model, noise = Labelled().to(args.device), diffusers.DDPMScheduler(**config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    def step(images, labels):
        eps, t = torch.randn_like(images), torch.randint(0, 999, (len(images),), device=args.device)
        F.mse_loss(model(noise.add_noise(images, eps, t), t, labels), eps).backward()
        optimizer.step()
        optimizer.zero_grad()
    steps = until(args, digit_dataloaders(128, device=args.device).train, step)
    scheduler = diffusers.DDIMScheduler(**config)
    def draw(labels, generator):
        scheduler.set_timesteps(args.steps)
        xt = torch.randn(len(labels), 1, 28, 28, generator=generator).to(args.device)
        for t in scheduler.timesteps: xt = scheduler.step(model(xt, t, labels), t, xt).prev_sample
        return xt
    return steps, count(model), draw


# ---- all of them

RIVALS = {'lesson 06': lesson_06, 'denoising-diffusion-pytorch': lucidrains,
          'denoising-diffusion-pytorch, lr 1e-3': lambda args: lucidrains(args, 1e-3),
          'diffusers UNet2DModel': hugging_face}


def count(model) -> int:
    "Weights"
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def drawn(args, draw) -> tuple[torch.Tensor, torch.Tensor]:
    "n pictures and what they should be"
    labels, parts = torch.arange(args.n) % 10, []
    for i, part in enumerate(labels.split(250)):
        parts.append(draw(part.to(args.device), torch.Generator().manual_seed(i)).clamp(-1, 1).cpu())
    return torch.cat(parts), labels


def rival(args, name, real) -> dict:
    "Train, draw, measure"
    torch.manual_seed(0)
    start, processors = time.perf_counter(), time.process_time()
    steps, weights, draw = RIVALS[name](args)
    taken = dict(seconds=time.perf_counter() - start, processors=time.process_time() - processors)
    found = evaluate(*drawn(args, draw), real)
    return dict(steps=steps, weights=weights, **taken, **{key: found[key] for key in KEYS})


def main():
    "Train and measure all, print the table, write the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=600, help='of training, for each (default: 600)')
    parser.add_argument('--n', type=int, default=1000, help='digits to draw, 200 to 10000 (default: 1000)')
    parser.add_argument('--only', nargs='+', choices=RIVALS, default=[*RIVALS], metavar='NAME',
                        help='some of ' + ', '.join(RIVALS))
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--quick', action='store_true', help='two seconds each, to see that it runs')
    args = parser.parse_args()
    args.steps, args.real = 25, 10_000
    if args.quick: args.seconds, args.n, args.steps, args.real = 2, 200, 1, 1000
    if not args.seconds > 0: parser.error(f'--seconds must be above 0, not {args.seconds}')
    if not 200 <= args.n <= 10_000: parser.error(f'--n must lie between 200 and 10000, not {args.n}')
    warnings.filterwarnings('ignore', message='.*torch.jit.script')              # fastai's import sets it off
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    real = features(random_digits('train', args.real).images)
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])                      # imports more, once, for all of them
    floor, found = evaluate(*random_digits('test', args.n), real), {}
    print(f'\n{f"{args.seconds:g} s each, {args.n} digits":<40}{"weights":>12}{"steps":>8}{"right":>9}{"FID":>9}')
    for name in args.only:
        row = found[name] = rival(args, name, real)
        print(f'{name:<40}{row["weights"]:>12,}{row["steps"]:>8}{row["label_accuracy"]["value"]:>9.1%}'
              f'{row["fid"]["value"]:>9.2f}', flush=True)
    print(f'{"real test digits":<60}{floor["label_accuracy"]["value"]:>9.1%}{floor["fid"]["value"]:>9.2f}')
    others, goals = [row['fid']['value'] for name, row in found.items() if name != 'lesson 06'], {}
    if others and 'lesson 06' in found:
        goals['FID, lesson 06 / the best other'] = goal(found['lesson 06']['fid']['value']/min(others), 'at most', .5)
        print_goals(goals)
    settings = dict(seconds=args.seconds, n=args.n, steps=args.steps, guidance=GUIDANCE)
    if args.json: args.json.write_text(json.dumps(dict(
        machine=machine(args.device), settings=settings, rivals=found, floor={key: floor[key] for key in KEYS},
        goals=goals), indent=2) + '\n')


if __name__ == '__main__': main()
