"""How fast infogan.py is on this machine: rows of speeds and of ratios within this one run.

    python data/bench.py

draws 2,000 faces and measures how long a start takes, how fast pictures come from files to batches,
whole training steps, where the time of a step goes, a whole training with its files, and the most
memory that all of it took.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import draw_faces

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler, which is C++, writes nothing to stderr

import torch
import torch.nn.functional as F

import infogan
from infogan import Batch, Codes, CodeSpec, Discriminator, Generator

HERE = Path(__file__).resolve().parent.parent


def plain_step(G, D, opt_G, opt_D, x, codes, spec):
    """The notebook's loop: nothing decoded ahead, nothing frozen, no layouts, probabilities."""
    bce, real, fake = F.binary_cross_entropy, x.new_ones(len(x)), x.new_zeros(len(x))
    x_fake = G(spec.join(codes))
    opt_D.zero_grad()
    bce(D(x)[0].sigmoid(), real).backward()
    bce(D(x_fake.detach())[0].sigmoid(), fake).backward()
    opt_D.step()
    opt_G.zero_grad()
    d, q = D(x_fake)
    loss = bce(d.sigmoid(), real) - infogan.log_q(q, codes).sum(1).mean()
    loss.backward()
    opt_G.step()
    return loss.item()


def rate(job, n: int, seconds: float = 2.0) -> float:
    """Pictures a second of job, which handles n, after one call to warm up."""
    job()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not calls:
        job()
        calls += 1
    return n * calls / (time.perf_counter() - start)


def seconds_of(job, device: torch.device) -> float:
    """Of one call, until the device has done it all."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - start


def bench_pictures(folder: str, device: torch.device) -> None:
    """Pictures a second from files to batches on the device, ours beside torchvision's."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    x = infogan.to_device_if_it_fits(infogan.load_pictures(folder, 64).x, device)
    rng = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(x), generator=rng).split(128)[:-1]

    def epoch() -> None:
        for which in shuffled:
            infogan.make_batch(x.index_select(0, which.to(x.device)), False, rng, device)

    ours = rate(epoch, 128 * len(shuffled))
    print(f"input path, ours                       {ours:10,.0f} pictures/s")
    known = [transforms.Resize(64), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    images = datasets.ImageFolder(folder, transforms.Compose(known))
    for workers in (0, 2):
        loader = DataLoader(images, 128, True, num_workers=workers)
        theirs = rate(lambda data=loader: [y.to(device) for y, _ in data], len(images), 1)
        told = f"{theirs:10,.0f} pictures/s, ours {ours / theirs:.0f} times that"
        print(f"  ImageFolder, DataLoader, {workers} workers    {told}")


V3 = ["--n-cat", "10", "--n-cont", "20", "--channels", "3"]
BARE = ["--r1", "0", "--ema", "0"]  # the default recipe with nothing added


def bench_steps(device: torch.device) -> float:
    """Whole steps, in turn, so that a machine that slows down slows all of them down.

    Returns the pictures a second of the step that bench_loop takes.
    """
    spec, B = CodeSpec(10, 10, 20), 128
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(B, 3, 64, 64, generator=rng).to(device) * 2 - 1
    codes = Codes(*(c.to(device) for c in spec.sample(B, rng)))
    nets = [Generator(spec, upsample="transposed").to(device), Discriminator(spec).to(device)]
    for m in (m for net in nets for m in net.modules()):  # the notebook's are plain convolutions
        plain = {
            infogan.Conv2dToPixel: torch.nn.Conv2d,
            infogan.ConvTranspose2dFromPixel: torch.nn.ConvTranspose2d,
        }
        m.__class__ = plain.get(type(m), type(m))
    opts = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in nets]
    steps = {"notebook's loop": lambda: plain_step(*nets, *opts, x, codes, spec)}
    batch = Batch(
        x.contiguous(memory_format=torch.channels_last),
        codes,
        torch.rand(B, infogan.N_U, generator=rng).to(device),
        torch.tensor(8.0, device=device),  # that of most epochs
        torch.tensor(0.999, device=device),
    )
    fast = infogan.speed_up(device)
    ours = {"notebook's mathematics": ["--recipe", "notebook", "--no-amp"]}
    ours |= {"default": ["--no-amp"], "default, bare": ["--no-amp", *BARE]}
    ours |= {"default, bfloat16": ["--amp"]} if fast else {}
    ours |= {"default, CUDA graph": ["--cuda-graph"]} if device.type == "cuda" else {}
    ours["first epochs, no R1"] = loop_flags(device)
    jobs = {"R1": ["--no-amp"], **ours}
    for name, flags in jobs.items():
        args = infogan.parse_args([*V3, *flags])
        args.amp = fast if args.amp is None else args.amp
        state = infogan.new_state(args, device)
        # D sees shifted pictures at both; only the first has R1
        state.step = 1000 * infogan.R1_EVERY + (name != "R1")
        step = infogan.GraphedStep() if args.cuda_graph else infogan.train_step
        jobs[name] = lambda f=step, s=state, a=args: f(s, a, batch)
    with_r1 = jobs.pop("R1")
    steps |= jobs

    a = torch.randn(4096, 4096, device=device)
    jobs = steps | {"R1": with_r1, "product": lambda: a @ a}
    took = {name: [] for name in jobs}
    for turn in range(40 if device.type == "cuda" else 7):
        for name, job in jobs.items():
            seconds = seconds_of(job, device)
            if turn > (4 if device.type == "cuda" else 0):  # these warm up, or capture a graph
                took[name].append(seconds)
    took = {name: min(each) for name, each in took.items()}  # what the machine can when it is free
    for name in steps:
        times = took["notebook's loop"] / took[name]
        print(f"step, {name:26} {B / took[name]:10.1f} pictures/s, {times:.2f} times the loop")
    bare, usual = took["default, bare"], took["default"]
    r1 = (took["R1"] - usual) / infogan.R1_EVERY / bare
    print(
        f"default recipe over its bare step {usual / bare - 1 + r1:15.1%}, of it R1, lazy, {r1:.1%}"
    )
    name = "notebook's mathematics"
    bench_profile(steps[name], took[name], took["product"], device)
    return B / took["first epochs, no R1"]


def bench_profile(step, seconds: float, product: float, device: torch.device) -> None:
    """Where the time of a step goes, and how near its FLOP/s are to those of a matrix product.

    seconds is how long a step takes at best, product how long two 4096x4096 matrices do.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        step()
    flops, most = counted.get_total_flops() / seconds, 2 * 4096**3 / product
    told = f"{flops / 1e9:,.0f} G of a matrix product's {most / 1e9:,.0f} G"
    print(f"FLOP/s of the notebook's mathematics{flops / most:13.1%}, {told}")
    cuda = device.type == "cuda"
    profiles = []
    for _ in range(4):
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profile(activities=kinds, acc_events=True) as profiled:
            step()
        spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total
                 for e in profiled.key_averages()}  # fmt: skip
        profiles.append((sum(spent.values()), spent))
    whole, spent = min(profiles, key=lambda p: p[0])
    conv = {key for key in spent if key.startswith("aten::") and "conv" in key}
    print(f"  in convolutions {sum(spent[key] for key in conv) / whole:33.1%}")
    for key in sorted(spent.keys() - conv, key=spent.get)[:-5:-1]:
        print(f"  {key:36}{spent[key] / whole:13.1%}")


START = """
import sys, infogan
def begun(*_):
    raise KeyboardInterrupt
infogan.train_step = begun
sys.exit(infogan.main(sys.argv[1:]))
"""


def bench_start(folder: str) -> None:
    """Seconds from the command to the first step, import included."""
    for name in ("cold", "warm"):
        command = [sys.executable, "-c", START, *V3, "--data", folder, "--out", f"{folder}-{name}"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode != 130:  # that of a run which Ctrl-C ended
            sys.exit(f"the run did not come to its first step:\n{done.stderr}")
        print(f"start to first step, {name}              {seconds:10.1f} s")


def bench_loop(folder: str, device: torch.device, step: float) -> None:
    """A training with its files and its progress line, beside its step alone (pictures/s)."""
    n, out = 480 if device.type == "cuda" else 32, f"{folder}-loop"
    flags = [*V3, *loop_flags(device), "--data", folder, "--device", str(device), "--out", out]
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        code = infogan.main([*flags, "--max-steps", str(n)])
    if code:
        sys.exit(f"the training ended with {code}")
    with open(f"{out}/log.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    first, last = rows[len(rows) // 3], rows[-1]
    minutes = last["minutes"] - first["minutes"]
    speed = 128 * (last["step"] - first["step"]) / (60 * minutes)
    print(f"whole loop, first epochs, no R1        {speed:10.1f} pictures/s, "
          f"{speed / step:.2f} times its step")  # fmt: skip


def loop_flags(device: torch.device) -> list[str]:
    """The fastest step of the first epochs, before pictures are shifted."""
    return ["--shift", "0", "--r1", "0", *(["--cuda-graph"] if device.type == "cuda" else [])]


def main(argv: list[str] | None = None) -> None:
    import resource

    parser = argparse.ArgumentParser(
        description="Measure speed here: machines differ, so mostly as ratios within this one run."
    )
    parser.add_argument("--device", default="auto", help="such as cpu, cuda (default: the fastest)")
    device = infogan.pick_device(parser.parse_args(argv).device)
    infogan.speed_up(device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device_name}, {torch.get_num_threads()} threads; "
          "v3 at 64x64, width 64, batch 128")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        draw_faces.main([f"{folder}/faces/all", "--n", "2000", "--workers", "2"])
        bench_start(f"{folder}/faces")
        bench_pictures(f"{folder}/faces", device)
        default = bench_steps(device)
        bench_loop(f"{folder}/faces", device, default)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(f"peak memory of all this                {peak:10,.0f} MB")


if __name__ == "__main__":
    main()
