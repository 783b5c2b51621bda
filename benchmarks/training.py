"""How fast the model of lesson 12 is trained, beside diffusers' in the usual loop: a table, and the same as JSON.

    python benchmarks/training.py [--batch 128] [--steps 8] [--repeats 5] [--device NAME] [--json FILE] [--quick]

Both have the same data, the same VAE and text encoder, and U-Nets of the same configuration. A step is all of it:
compose scenes, encode them, mix noise in, forward, backward, optimizer, and in ours the moving average. The median of
the repeats, which take turns, after one that is not counted. Memory: the peak of a process that does nothing else.
"""
import argparse
import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import clock, goal, in_turns, machine, middle, peak, peaks, print_goals
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdcourse import text_to_image as lesson
from sdcourse.model import PRETRAINED, default_device
from sdcourse.tokenizer import CLIPTokenizer

PARTS = PRETRAINED/'scenes'


def of_lesson_12(args, dtype):
    "A function that trains for some steps as the lesson does, fastai and all, and returns the pictures a second."
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.training import GradientClip
    tokenizer = CLIPTokenizer.from_pretrained(PARTS/'clip')
    learn = lesson._learner(PARTS, tokenizer, args.batch, args.n, .1, False, 0, args.device, dtype)
    times, seen = [], []
    def after_batch(self):
        times.append(clock(args.device))
        seen.append(len(self.xb[0]))
        if self.iter == args.steps: raise CancelFitException
    def run():
        times.clear(), seen.clear()
        fast = sdpa_kernel(SDPBackend.MATH) if args.device.type == 'cpu' else nullcontext()
        with fast, learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3, wd=.02, cbs=[GradientClip(1.), Callback(after_batch=after_batch)])
        return sum(seen[1:])/(times[-1] - times[0])
    return run


def usual_parts(args):
    "Diffusers' and transformers' parts, from the same folder; the U-Net is new"
    import diffusers
    import transformers
    vae = diffusers.AutoencoderKL.from_pretrained(PARTS/'vae').to(args.device)
    text = transformers.CLIPTextModel.from_pretrained(PARTS/'text_encoder').to(args.device)
    unet = diffusers.UNet2DConditionModel(**lesson.UNET).to(args.device)
    return vae, text, unet, diffusers.DDPMScheduler(**{k: v for k, v in lesson.SCHEDULER.items()
                                                       if k not in ('set_alpha_to_one',)})


def usual(args, helped=False):
    "Diffusers' usual loop: float32, AdamW, gradients cut. `helped`: with channels_last, bfloat16 and fused AdamW too"
    vae, text, unet, scheduler = usual_parts(args)
    if helped: unet = unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=.02, fused=helped)
    tokenizer = CLIPTokenizer.from_pretrained(PARTS/'clip')
    dls = lesson.prompt_dataloaders(tokenizer, args.batch, n=args.n, valid=1, device=args.device)
    empty = tokenizer([''], padding='max_length').input_ids.to(args.device)
    def step(images, ids):
        ids = torch.where(torch.rand(len(ids), 1, device=args.device) < .1, empty, ids)
        with torch.no_grad():
            x0 = vae.encode(images).latent_dist.sample()*vae.config.scaling_factor
            context = text(ids)[0]
        eps, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=args.device)
        xt, target = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
        with torch.autocast(args.device.type, torch.bfloat16) if helped else nullcontext():
            output = unet(xt, t, context).sample
        F.mse_loss(output.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        return len(x0)
    def run():
        seen = 0
        for i, (images, ids) in enumerate(dls.train):
            found = step(images, ids)
            if i: seen += found
            else: start = clock(args.device)
            if i == args.steps: return seen/(clock(args.device) - start)
    return run


WAYS = {  # name -> makes a function that trains and returns the pictures a second
    'lesson 12 (bfloat16)': lambda args: of_lesson_12(args, torch.bfloat16),
    'diffusers, usual loop': usual,
    'lesson 12 in float32': lambda args: of_lesson_12(args, torch.float32),
    'diffusers, helped': lambda args: usual(args, helped=True),
}


def parse() -> argparse.Namespace:
    "What was typed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=128, help='scenes composed for a batch (default: 128)')
    parser.add_argument('--steps', type=int, default=8, help='that are timed, after one that is not (default: 8)')
    parser.add_argument('--repeats', type=int, default=5, help='counted repeats (default: 5)')
    parser.add_argument('--device', type=torch.device, default=default_device(), help='(default: the fastest here)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the numbers there')
    parser.add_argument('--only', choices=WAYS, help='train that way, once, and print the peak of memory in MiB')
    parser.add_argument('--quick', action='store_true', help='a little of each, to see that it runs')
    args = parser.parse_args()
    if args.quick: args.batch, args.steps, args.repeats = 8, 1, 1
    for name in ('batch', 'steps', 'repeats'):
        if getattr(args, name) < 1: parser.error(f'--{name} must be at least 1, not {getattr(args, name)}')
    args.n = args.batch*(args.steps + 1)
    return args


def main():
    "Measure, print the tables, write the JSON."
    warnings.filterwarnings('ignore', message='.*torch.jit.script')  # fastai's import sets it off
    args = parse()
    if args.only:
        WAYS[args.only](args)()
        return print(json.dumps(peak(args.device)))
    print(', '.join(f'{k} {v}' for k, v in machine(args.device).items()))
    found = in_turns({name: make(args) for name, make in WAYS.items()}, args.repeats)
    words = ['--batch', args.batch, '--steps', args.steps, '--device', args.device]
    memory = peaks(__file__, [*WAYS][:2] if args.quick else WAYS, min(args.repeats, 3), words)   # which scatters little
    what = f'batches of {args.batch}, median of {args.repeats}'
    print(f'\n{what:<36}{"images/s":>10}{"min":>10}{"max":>10}{"MiB":>10}')
    for name, values in found.items():
        mib = f'{middle(memory[name]):>10.0f}' if name in memory else ''
        print(f'{name:<36}{middle(values):>10.2f}{min(values):>10.2f}{max(values):>10.2f}{mib}')
    ours, theirs = (middle(values) for values in list(found.values())[:2])
    print_goals(goals := {'images a second, lesson 12 / diffusers': goal(ours/theirs, 'at least', 1.5)})
    settings = {name: getattr(args, name) for name in ('batch', 'steps', 'repeats')}
    if args.json: args.json.write_text(json.dumps(dict(machine=machine(args.device), settings=settings, speed=found,
                                                       memory=memory, goals=goals), indent=2) + '\n')


if __name__ == '__main__': main()
