"""What runs on a GPU only, proved on the CPU: calls that refuse what torch refuses there.

The meta device stands for the GPU where tensors must not leave it. Where there is a GPU, the step
as a CUDA graph is compared with the eager one.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_infogan import said_one_line, torchs_settings_stay  # noqa: F401, I001

import generate
import infogan
from infogan import UserError

SMALL = ["--image-size", "16", "--width", "4", "--batch-size", "8"]
SMALL += ["--channels", "3", "--r1", "0.3", "--shift", "0.125"]


def state_and_args(*flags: str, device: str = "cpu") -> tuple:
    args = infogan.parse_args([*SMALL, "--no-amp", *flags])
    return infogan.new_state(args, torch.device(device)), args


def draw_batch(state, args, rng: torch.Generator) -> infogan.Batch:
    """A batch of noise for the state's step, on its device."""
    x = torch.rand(8, 3, args.image_size, args.image_size, generator=rng) * 2 - 1
    codes, u = state.spec.sample(8, rng), torch.rand(8, infogan.N_U, generator=rng)
    numbers = float(infogan.max_shift_at(state, args)), infogan.beta_at(state, args)
    batch = infogan.Batch(x, codes, u, *map(torch.tensor, numbers))
    return tree_map(lambda t: t.to(state.device), batch)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, whose calls refuse what torch's refuse."""
    used, real_ones = [], torch.ones

    def set_device(device) -> None:
        device = torch.device(device) if isinstance(device, str) else device
        if not isinstance(device, int) and device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got {device}")
        used.append(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: real_ones(*size))
    return used


def test_a_gpu_is_always_used_by_its_number(gpus):
    for name in ("auto", "cuda", "cuda:0", "cuda:1"):
        assert infogan.speed_up(infogan.pick_device(name))
    assert gpus == ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"


def test_a_gpu_that_this_torch_cannot_use_is_one_line(gpus, monkeypatch, capsys):
    def refuse(*_, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")

    monkeypatch.setattr(torch, "ones", refuse)
    assert infogan.main(["--device", "cuda:1"]) == 2
    said_one_line(capsys, "--device cuda:1", "no kernel image", "use --device cpu")


@pytest.mark.parametrize("flags, has_fast_bfloat16, chosen", [
    ([], True, (True, True)), ([], False, (False, True)),
    (["--no-cuda-graph"], True, (False, False)), (["--no-amp"], True, (False, True)),
    (["--amp", "--no-cuda-graph"], True, (True, False)), (["--amp"], False, None),
])  # fmt: skip
def test_a_gpu_replays_graphs_in_bfloat16_where_that_is_fast(
    gpus, monkeypatch, flags, has_fast_bfloat16, chosen
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_fast_bfloat16)
    args = infogan.parse_args(flags)
    if chosen is None:
        with pytest.raises(UserError, match="--amp: this GPU has no fast bfloat16; leave it out"):
            infogan.choose_precision(args, torch.device("cuda:0"))
    else:
        infogan.choose_precision(args, torch.device("cuda:0"))
        assert (args.amp, args.cuda_graph) == chosen


def test_what_goes_to_a_gpu_is_pinned_and_nothing_waits_for_it(monkeypatch):
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (done.append("pinned"), x)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: (done.append((*a, k)), x)[1])
    gpu, how = torch.device("cuda:0"), {"non_blocking": True}
    infogan.to_device(torch.zeros(2), gpu)
    infogan.to_device(torch.zeros(2, device="meta"), gpu)  # on a device already: not pinned
    infogan.to_device(torch.zeros(2), torch.device("cpu"))
    assert done == ["pinned", (gpu, how), (gpu, how), (torch.device("cpu"), how)]


def test_the_set_goes_to_a_gpu_where_half_of_its_memory_is_free(monkeypatch):
    x, gpu = torch.zeros(100, dtype=torch.uint8), torch.device("cuda:0")
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: (x, device))
    for free, moved in ((199, False), (202, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d, free=free: (free, 10**9))
        assert (infogan.to_device_if_it_fits(x, gpu) is not x) == moved
    assert infogan.to_device_if_it_fits(x, torch.device("cpu")) is x


class OnDevice(TorchDispatchMode):
    """Notes what a CUDA graph refuses: tensors of the CPU, and waiting for a value."""

    def __init__(self):
        super().__init__()
        self.refused = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        waits = func is torch.ops.aten._local_scalar_dense.default
        if waits or any(t.device.type == "cpu" for t in tensors):
            self.refused.append(str(func))
        return out


@pytest.mark.parametrize(
    "flags", [["--n-cat", "10", "--n-cont", "20"], ["--q-augment", "1"], ["--recipe", "notebook"]]
)
def test_the_step_takes_nothing_from_the_cpu(monkeypatch, flags):
    state, args = state_and_args(*flags, device="meta")
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # meta has none
    for name in infogan.OPTIMISERS:  # Adam counts its steps on the CPU but with capturable=True
        groups = getattr(state, name).param_groups
        setattr(state, name, torch.optim.SGD(groups[0]["params"], 0.1))
    for step in (0, 1, 1000, 1008):  # with and without R1; shifted in the end
        state.step = step
        batch = draw_batch(state, args, torch.Generator().manual_seed(0))
        with OnDevice() as mode:
            metrics = infogan.train_step(state, args, batch)
        assert mode.refused == []
        assert {(v.device.type, v.dtype) for v in metrics.values()} == {("meta", torch.float32)}


def test_adam_can_be_captured_where_the_step_is_and_does_not_warn_of_it(monkeypatch):
    for flags in ([], ["--cuda-graph"]):
        state, args = state_and_args(*flags)
        ckpt = infogan.gather_checkpoint(state, args, "") | {"path": "last.pt"}
        infogan.restore(state, ckpt)
        for opt in (state.opt_G, state.opt_D):
            assert opt.param_groups[0]["capturable"] == bool(flags)
            assert opt._warned_capturable_if_run_uncaptured  # torch warns where this is False


class Replayed(infogan.GraphedStep):
    """A graph played on the CPU: it runs the step on the fixed tensors, into fixed metrics."""

    def capture(self, state, args, key):
        metrics, batch = {}, self.batch
        for _ in range(3):  # as on a GPU, these are steps that have to be undone
            infogan.train_step(state, args, batch, key)

        class Graph:
            def replay(graph) -> None:
                for name, value in infogan.train_step(state, args, batch, key).items():
                    metrics.setdefault(name, value.clone()).copy_(value)

        return Graph(), metrics


def run_steps(step_once, steps: int, *flags: str, device: str = "cpu") -> infogan.State:
    """The state after some steps, so that all variants come, its metrics added up."""
    state, args = state_and_args(*flags, device=device)
    state.per_epoch, rng = 4, torch.Generator().manual_seed(1)
    for _ in range(steps):
        state.add(step_once(state, args, draw_batch(state, args, rng)))
        state.step += 1
    return state


def all_equal(one: infogan.State, two: infogan.State) -> bool:
    tensors = [infogan.tensors_of(state) + [*state.sums.values()] for state in (one, two)]
    return all(a.equal(b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("steps", [1, 140])
def test_a_replayed_step_is_the_eager_one(steps):
    """Every variant is captured at once, which changes no result."""
    graphed = Replayed()
    one, two = (run_steps(step, steps) for step in (infogan.train_step, graphed))
    assert {*graphed.graphs} == {(r1, shifts) for r1 in (False, True) for shifts in (False, True)}
    assert all_equal(one, two)


def test_only_variants_that_can_come_are_captured():
    graphed = Replayed()
    run_steps(graphed, 1, "--r1", "0", "--shift", "0")
    assert [*graphed.graphs] == [(False, False)]


def test_a_resumed_run_is_captured_without_a_change():
    """Optimisers have a state by then, which is not zeros."""
    ends = []
    for step in (infogan.train_step, Replayed()):
        state, args = state_and_args()
        rng = torch.Generator().manual_seed(1)
        for step_once in (infogan.train_step, infogan.train_step, step, step):
            state.add(step_once(state, args, draw_batch(state, args, rng)))
            state.step += 1
        ends.append(state)
    assert all_equal(*ends)


def test_where_a_step_cannot_be_captured_one_line_says_why_and_steps_go_on(capsys):
    class Refused(Replayed):
        def capture(self, state, args, key):
            if len(self.graphs) < 2:
                return super().capture(state, args, key)
            infogan.train_step(state, args, self.batch, key)
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            except RuntimeError:
                raise RuntimeError("capture was invalidated")  # noqa: B904 (as torch does)

    refused = Refused()
    one, two = (run_steps(step, 20) for step in (infogan.train_step, refused))
    assert not refused.graphs and all_equal(one, two)
    said_one_line(capsys, "no CUDA graph: operation not permitted when stream is capturing;")


def test_a_failed_capture_leaves_the_stream_that_torch_does_not(monkeypatch):
    """torch.cuda.graph begins a capture on another stream, and stays on it when that fails."""
    streams = ["usual"]

    class Stream:
        def wait_stream(self, _):
            pass

    @contextmanager
    def graph(*_):
        streams.append("capturing")
        raise RuntimeError("no memory")
        yield

    usual = Stream()
    fakes = {"Stream": Stream, "graph_pool_handle": object, "current_stream": lambda: usual}
    fakes |= {"stream": lambda _: nullcontext(), "CUDAGraph": object, "graph": graph}
    fakes["set_stream"] = lambda stream: streams.append("usual" if stream is usual else "other")
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphed, (state, args) = infogan.GraphedStep(), state_and_args()
    graphed.batch = draw_batch(state, args, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="no memory"):
        graphed.capture(state, args, (False, False))
    assert streams == ["usual", "capturing", "usual"]


def test_a_graph_without_a_gpu_is_one_line(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert infogan.main(["--cuda-graph", "--out", str(tmp_path / "run")]) == 2
    assert "--cuda-graph: needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [
    "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "Tried to allocate 2.00 GiB",
    "FIND was unable to find an engine to execute", "else",
])  # fmt: skip
def test_all_that_torch_says_of_a_full_gpu_is_one_line_with_advice(capsys, words):
    def job():
        raise RuntimeError(f"{words}\nCompile with more")

    if words == "else":
        with pytest.raises(RuntimeError):
            infogan.run("infogan.py", job)
    else:
        assert infogan.run("infogan.py", job) == 2
        said_one_line(capsys, "infogan.py: out of memory; lower --batch-size")
        assert infogan.run("x.py", job, "buy a larger one") == 2
        said_one_line(capsys, "x.py: out of memory; buy a larger one")


def test_places_of_augmented_pictures_are_float32_in_bfloat16_too(monkeypatch):
    seen, real = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda x, at, **k: (seen.append(at), real(x, at, **k))[1])
    x, u = torch.rand(4, 3, 16, 16), torch.rand(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        infogan.augment(x, u, 1.0)
    infogan.augment(x, u, 1.0)
    assert seen[0].dtype == torch.float32 and seen[0].equal(seen[1])


# on a GPU -----------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@on_gpu
@pytest.mark.parametrize("flags", [[], ["--recipe", "notebook"], ["--n-cat", "10"]])
def test_a_cuda_graph_computes_what_eager_steps_do(flags):
    """As near as two eager runs come to each other, which atomic sums keep apart."""

    def weights(step_once) -> torch.Tensor:
        state = run_steps(step_once, 140, *flags, "--cuda-graph", device="cuda:0")
        return torch.cat([t.flatten().double() for t in infogan.tensors_of(state)])

    graphed = infogan.GraphedStep()
    eager, again, replayed = map(weights, (infogan.train_step, infogan.train_step, graphed))
    assert graphed.graphs
    apart = (eager - again).abs().mean()
    assert (eager - replayed).abs().mean() <= 3 * apart + 1e-7


@on_gpu
def test_a_run_on_a_gpu_resumes_and_is_shown(tmp_path, capsys):
    (tmp_path / "faces").mkdir()
    for i in range(64):
        noise = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.byte().numpy()).save(tmp_path / f"faces/{i}.png")
    flags = [*SMALL, "--data", str(tmp_path / "faces"), "--out", str(tmp_path / "run")]
    for steps in ("24", "48"):
        assert infogan.main([*flags, "--device", "cuda", "--max-steps", steps]) == 0
    said = capsys.readouterr().out
    assert torch.cuda.get_device_name(0) in said and "CUDA graph" in said and "step 24" in said
    assert generate.main(["--ckpt", str(tmp_path / "run/last.pt"), "--samples", "4"]) == 0
