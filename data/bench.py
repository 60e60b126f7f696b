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
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import draw_faces

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler, which is C++, writes nothing to stderr

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import infogan
from infogan import Batch, CodeSpec, Discriminator, Generator

HERE = Path(__file__).resolve().parent.parent
B = 128  # pictures in a step
V3 = ["--n-cat", "10", "--n-cont", "20", "--channels", "3"]
FIRST_EPOCHS = ["--shift", "0", "--r1", "0"]  # before D's pictures are shifted


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


def seconds_of(job: Callable, device: torch.device) -> float:
    """Of one call, until the device has done it all."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - start


def rate(job: Callable, n: int, device: torch.device, seconds: float = 2.0) -> float:
    """Pictures a second of job, which handles n, after one call to warm up."""
    job()
    took = []
    while sum(took) < seconds:
        took.append(seconds_of(job, device))
    return n * len(took) / sum(took)


def bench_pictures(folder: str, device: torch.device) -> None:
    """Pictures a second from files to batches on the device, ours beside torchvision's."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    x = infogan.to_device_if_it_fits(infogan.load_pictures(folder, 64).x, device)
    rng = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(x), generator=rng).split(B)[:-1]

    def epoch() -> None:
        for which in shuffled:
            infogan.make_batch(x.index_select(0, which.to(x.device)), False, rng, device)

    ours = rate(epoch, B * len(shuffled), device)
    print(f"input path, ours                       {ours:10,.0f} pictures/s")
    known = [transforms.Resize(64), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    images = datasets.ImageFolder(folder, transforms.Compose(known))
    for workers in (0, 2):
        loader = DataLoader(images, B, True, num_workers=workers)
        theirs = rate(lambda data=loader: [y.to(device) for y, _ in data], len(images), device, 1)
        told = f"{theirs:10,.0f} pictures/s, ours {ours / theirs:.0f} times that"
        print(f"  ImageFolder, DataLoader, {workers} workers    {told}")


def random_batch(spec: CodeSpec, device: torch.device) -> Batch:
    """What a step takes, shifted by up to 8 pixels, the most that there is."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(B, 3, 64, 64, generator=rng) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    codes, u = spec.sample(B, rng), torch.rand(B, infogan.N_U, generator=rng)
    batch = Batch(x, codes, u, torch.tensor(8.0), torch.tensor(0.999))
    return tree_map(lambda t: t.to(device), batch)


def notebook_loop(batch: Batch, spec: CodeSpec, device: torch.device) -> Callable:
    """A step of plain_step, with the notebook's networks."""
    G, D = Generator(spec, upsample="transposed", cont_at=4), Discriminator(spec)
    plain = {
        infogan.Conv2dToPixel: torch.nn.Conv2d,
        infogan.ConvTranspose2dFromPixel: torch.nn.ConvTranspose2d,
    }
    for module in (*G.modules(), *D.modules()):
        module.__class__ = plain.get(type(module), type(module))
    nets = G.to(device), D.to(device)
    opts = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999)) for net in nets]
    x = batch.x.contiguous()
    return lambda: plain_step(*nets, *opts, x, batch.codes, spec)


def our_step(
    batch: Batch, flags: Sequence[str], device: torch.device, r1: bool = False
) -> Callable:
    """A step of infogan.py with these flags, late in a run; with R1, or without."""
    args = infogan.parse_args([*V3, *flags])
    infogan.choose_precision(args, device)
    state = infogan.new_state(args, device)
    state.step = 1000 * infogan.R1_EVERY + (not r1)
    step = infogan.GraphedStep() if args.cuda_graph else infogan.train_step
    return lambda: step(state, args, batch)


def step_kinds(device: torch.device) -> dict[str, list[str]]:
    """The flags of each way to compute a step on this device; the last is the default."""
    fast, cuda = infogan.speed_up(device), device.type == "cuda"
    eager = ["--no-cuda-graph"] if cuda else []
    kinds = {"eager float32": ["--no-amp", *eager]}
    if fast:
        kinds["eager bfloat16"] = ["--amp", *eager]
    if cuda:
        kinds["graph bfloat16" if fast else "graph float32"] = []
    return kinds


def time_in_turn(jobs: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """Seconds of each job when the machine is free: the least of several turns.

    In turn, so that a machine that slows down slows all of them down.
    """
    turns, warm = (40, 5) if device.type == "cuda" else (7, 1)  # some warm up, or capture a graph
    took = [[seconds_of(job, device) for job in jobs.values()] for _ in range(turns)]
    return dict(zip(jobs, map(min, zip(*took[warm:], strict=True)), strict=True))


def bench_steps(device: torch.device) -> float:
    """Whole steps. Returns the pictures a second of the one that bench_loop takes."""
    spec = CodeSpec(10, 10, 20)
    batch, kinds = random_batch(spec, device), step_kinds(device)
    exact = kinds["eager float32"]
    jobs = {"notebook's loop": notebook_loop(batch, spec, device)}
    jobs["notebook's mathematics"] = our_step(batch, ["--recipe", "notebook", *exact], device)
    for name, flags in kinds.items():
        jobs[name] = our_step(batch, [*flags, *FIRST_EPOCHS], device)
        jobs[f"{name}, shifted"] = our_step(batch, flags, device)
    a = torch.randn(4096, 4096, device=device)
    more = {"R1": our_step(batch, exact, device, r1=True), "product": lambda: a @ a}
    took = time_in_turn(jobs | more, device)

    for name in jobs:
        times = took["notebook's loop"] / took[name]
        print(f"step, {name:26} {B / took[name]:10.1f} pictures/s, {times:.2f} times the loop")
    without = took["eager float32, shifted"]
    r1 = (took["R1"] - without) / infogan.R1_EVERY / without
    print(f"R1, once in {infogan.R1_EVERY} steps, adds to them{r1:15.1%}")
    name = "notebook's mathematics"
    bench_flops(jobs[name], took[name], took["product"])
    bench_profile(jobs[name], device)
    return B / took[[*kinds][-1]]


def bench_flops(step: Callable, seconds: float, product: float) -> None:
    """How near a step's FLOP/s are to those of a matrix product.

    seconds is how long the step takes, product how long two 4096x4096 matrices do.
    """
    with FlopCounterMode(display=False) as counted:
        step()
    flops, most = counted.get_total_flops() / seconds, 2 * 4096**3 / product
    told = f"{flops / 1e9:,.0f} G of a matrix product's {most / 1e9:,.0f} G"
    print(f"FLOP/s of the notebook's mathematics{flops / most:13.1%}, {told}")


def bench_profile(step: Callable, device: torch.device) -> None:
    """Where the time of a step goes."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiles = []
    for _ in range(4):
        with profile(activities=activities, acc_events=True) as profiled:
            step()
        profiles.append(time_of_operators(profiled.key_averages(), device))
    spent = min(profiles, key=lambda spent: sum(spent.values()))
    whole = sum(spent.values())
    conv = {key for key in spent if key.startswith("aten::") and "conv" in key}
    print(f"  in convolutions {sum(spent[key] for key in conv) / whole:33.1%}")
    for key in sorted(spent.keys() - conv, key=spent.get)[:-5:-1]:
        print(f"  {key:36}{spent[key] / whole:13.1%}")


def time_of_operators(events: Sequence, device: torch.device) -> dict[str, float]:
    """The time of each operator on the device, without those that it calls.

    On a GPU that is the time of its kernels. A profile lists these once more, as events of the GPU
    under names of their own: only what the CPU called counts, so that nothing counts twice.
    """
    time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return {e.key: getattr(e, time) for e in events if e.device_type == DeviceType.CPU}


START = """
import os, sys, torch, infogan

def end(state, metrics):
    add(state, metrics)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    os._exit(0)

add, infogan.State.add = infogan.State.add, end
sys.exit(infogan.main(sys.argv[1:]) or "there was no step")
"""


def bench_start(folder: str, device: torch.device) -> None:
    """Seconds from the command until the first step is done, import included."""
    for name in ("cold", "warm"):
        flags = [*V3, "--data", folder, "--out", f"{folder}-{name}", "--device", str(device)]
        command = [sys.executable, "-c", START, *flags]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"the run did not make its first step:\n{done.stderr}")
        print(f"start to the end of step 1, {name}       {seconds:10.1f} s")


def bench_loop(folder: str, device: torch.device, step: float) -> None:
    """A training with its files and its progress line, beside its step alone (pictures/s).

    What is measured begins after a third of it, and sees grids, kept checkpoints and last.pt: on a
    GPU, where time says when they come, it takes 75 seconds.
    """
    out = Path(f"{folder}-loop")
    ends = ["--max-steps", "48", "--sample-every", "2", "--save-every", "2"]
    if device.type == "cuda":
        ends = ["--max-minutes", "1.25", "--epochs", "1000000"]
    flags = [*V3, *FIRST_EPOCHS, "--data", folder, "--device", str(device), "--out", str(out)]
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        code = infogan.main([*flags, *ends])
    if code:
        sys.exit(f"the training ended with {code}")
    with open(out / "log.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    first, last = rows[len(rows) // 3], rows[-1]
    minutes = last["minutes"] - first["minutes"]
    speed = B * (last["step"] - first["step"]) / (60 * minutes)
    grids, kept = (len([*out.glob(name)]) for name in ("samples/epoch_*.png", "epoch_*.pt"))
    print(f"whole loop, first epochs, no R1        {speed:10.1f} pictures/s, "
          f"{speed / step:.2f} times its step; {grids} grids, {kept} kept")  # fmt: skip


def peak_memory(device: torch.device) -> float | None:
    """The most MB that all of this took: the GPU's, else this process's; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Measure speed here: machines differ, so mostly as ratios within this one run."
    )
    parser.add_argument("--device", default="auto", help="such as cpu, cuda (default: the fastest)")
    device = infogan.pick_device(parser.parse_args(argv).device)
    infogan.speed_up(device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device_name}, {torch.get_num_threads()} threads; "
          f"v3 at 64x64, width 64, batch {B}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        draw_faces.main([f"{folder}/faces/all", "--n", "2000", "--workers", "2"])
        bench_start(f"{folder}/faces", device)
        bench_pictures(f"{folder}/faces", device)
        step = bench_steps(device)
        bench_loop(f"{folder}/faces", device, step)
    if peak := peak_memory(device):
        print(f"peak memory of all this                {peak:10,.0f} MB")


if __name__ == "__main__":
    main()
