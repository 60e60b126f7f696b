"""What runs on a GPU only, proved on the CPU: calls that refuse what torch refuses there.

The meta device stands for the GPU where tensors must not leave it. Where there is a GPU, the step
as a CUDA graph is compared with the eager one.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
    numbers = float(infogan.reach_at(state, args)), infogan.beta_at(state, args)
    batch = infogan.Batch(x, codes, u, *map(torch.tensor, numbers))
    return tree_map(lambda t: t.to(state.device), batch)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, whose calls refuse what torch's refuse."""
    used = []

    def set_device(device) -> None:
        device = torch.device(device) if isinstance(device, str) else device
        if not isinstance(device, int) and device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got {device}")
        used.append(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    precision = torch.get_float32_matmul_precision()
    yield used
    torch.set_float32_matmul_precision(precision)


def test_a_gpu_is_always_used_by_its_number(gpus):
    for name in ("auto", "cuda", "cuda:0", "cuda:1"):
        assert infogan.speed_up(infogan.pick_device(name))
    assert gpus == ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"


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


def test_adam_can_be_captured_where_the_step_is(monkeypatch):
    made = []
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: made.append(k))
    for flags in ([], ["--cuda-graph"]):
        state_and_args(*flags)
    assert [k["capturable"] for k in made] == [False, False, True, True]


class Replayed(infogan.GraphedStep):
    """A graph played on the CPU: it runs the step on the fixed tensors, into fixed metrics."""

    def on_side_stream(self, state, args):
        return infogan.train_step(state, args, self.batch)

    def capture(self, state, args):
        metrics = {}

        class Graph:
            def replay(graph) -> None:
                for name, value in infogan.train_step(state, args, self.batch).items():
                    metrics.setdefault(name, value.clone()).copy_(value)

        return Graph(), metrics


def run_steps(step_once, steps: int, *flags: str, device: str = "cpu") -> tuple:
    """The state after some steps from a given one on, so that all variants come; metrics added."""
    state, args = state_and_args(*flags, device=device)
    state.per_epoch, rng = 4, torch.Generator().manual_seed(1)
    for _ in range(steps):
        state.add(step_once(state, args, draw_batch(state, args, rng)))
        state.step += 1
    return state


def test_a_replayed_step_is_the_eager_one():
    graphed = Replayed()
    one, two = (run_steps(step, 140) for step in (infogan.train_step, graphed))
    assert {*graphed.graphs} == {(r1, shifted) for r1 in (False, True) for shifted in (False, True)}
    for name in infogan.NETS:
        states = (getattr(state, name).state_dict() for state in (one, two))
        assert all(a.equal(b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert all(two.sums[name].equal(total) for name, total in one.sums.items())


def test_where_a_step_cannot_be_captured_one_line_says_what_to_do():
    class Refused(Replayed):
        def capture(self, state, args):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(UserError, match="capturing; the same command without it goes on"):
        run_steps(Refused(), 8)


def test_a_graph_without_a_gpu_is_one_line(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert infogan.main(["--cuda-graph", "--out", str(tmp_path / "run")]) == 2
    assert "--cuda-graph: needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("flags", [[], ["--recipe", "notebook"], ["--n-cat", "10"]])
def test_a_cuda_graph_computes_what_eager_steps_do(flags):
    graphed, flags = infogan.GraphedStep(), [*flags, "--cuda-graph"]
    one, two = (
        run_steps(step, 50, *flags, device="cuda:0") for step in (infogan.train_step, graphed)
    )
    assert graphed.graphs and not graphed.failed
    for a, b in zip(one.G.parameters(), two.G.parameters(), strict=True):
        assert (a - b).abs().mean() < 1e-3 and (a - b).abs().max() < 5e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_resumes_and_is_shown(tmp_path, capsys):
    (tmp_path / "faces").mkdir()
    for i in range(64):
        noise = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.byte().numpy()).save(tmp_path / f"faces/{i}.png")
    flags = [*SMALL, "--data", str(tmp_path / "faces"), "--out", str(tmp_path / "run")]
    for steps in ("24", "48"):  # graphs come after three steps of each kind
        flags += ["--device", "cuda", "--cuda-graph", "--max-steps", steps]
        assert infogan.main(flags) == 0
    said = capsys.readouterr().out
    assert torch.cuda.get_device_name(0) in said and "CUDA graph" in said and "step 24" in said
    assert generate.main(["--ckpt", str(tmp_path / "run/last.pt"), "--samples", "4"]) == 0
