"""What runs on a GPU only, proved on the CPU: calls that refuse what torch refuses there.

The meta device stands for the GPU where tensors must not leave it. Where there is a GPU, the step
as a CUDA graph is compared with the eager one.
"""

# ruff: noqa: F811, I001 (a fixture that is imported, and the argument of a test that takes it)
from contextlib import nullcontext
from unittest.mock import MagicMock, Mock

from pytest import fixture, mark, raises

from test_infogan import (  # noqa: F401 (it settles the threads before torch is loaded)
    cache, faces, said_one_line, seeded, settings_stay, tiny, tiny_batch, tiny_state,
)  # fmt: skip

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import infogan
from infogan import UserError

SHIFTED = "--r1 0.3 --shift 0.125"  # so that all variants of a step come


@fixture
def gpus(monkeypatch):
    """A machine with two GPUs, whose calls refuse what torch's refuse."""
    used = []

    def ones(_n, device):
        return Mock(device=torch.device("cuda:0" if device == "cuda" else device))

    def set_device(device) -> None:
        device = torch.device(device) if isinstance(device, str) else device
        if not isinstance(device, int) and device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got {device}")
        used.append(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "ones", ones)
    return used


def test_a_gpu_is_always_used_by_its_number(gpus):
    for name in ("auto", "cuda", "cuda:0", "cuda:1"):
        assert infogan.speed_up(infogan.pick_device(name))
    assert gpus == ["cuda:0", "cuda:0", "cuda:0", "cuda:1"]
    assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"


def test_a_gpu_that_this_torch_cannot_use_is_one_line(gpus, monkeypatch, capsys):
    error = RuntimeError("CUDA error: no kernel image is available for execution\nmore")
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
    assert infogan.main(["--device", "cuda:1"]) == 2
    said_one_line(capsys, "--device cuda:1", "no kernel image", "use --device cpu")


@mark.parametrize("flags, has_fast_bfloat16, chosen", [
    ("", True, (True, True)), ("", False, (False, True)),
    ("--no-cuda-graph", True, (False, False)), ("--no-amp", True, (False, True)),
    ("--amp --no-cuda-graph", True, (True, False)), ("--amp", False, None),
])  # fmt: skip
def test_a_gpu_replays_graphs_in_bfloat16_where_that_is_fast(
    gpus, monkeypatch, flags, has_fast_bfloat16, chosen
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_fast_bfloat16)
    args = infogan.parse_args(flags.split())
    if chosen is None:
        with raises(UserError, match="--amp: this GPU has no fast bfloat16; leave it out"):
            infogan.choose_precision(args, torch.device("cuda:0"))
    else:
        infogan.choose_precision(args, torch.device("cuda:0"))
        assert (args.amp, args.cuda_graph) == chosen


@mark.parametrize("source, target, is_pinned", [
    ("cpu", "cuda:0", True), ("cuda:0", "cuda:0", False), ("cpu", "cpu", False),
])  # fmt: skip
def test_what_goes_to_a_gpu_is_pinned_and_nothing_waits_for_it(source, target, is_pinned):
    x, target = Mock(device=torch.device(source)), torch.device(target)
    infogan.to_device(x, target)
    sent = x.pin_memory() if is_pinned else x
    sent.to.assert_called_once_with(target, non_blocking=True)


@mark.parametrize("device, free, moves", [
    ("cuda:0", 199, False), ("cuda:0", 202, True), ("cpu", 10**9, False),
])  # fmt: skip
def test_the_set_goes_to_a_gpu_where_half_of_its_memory_is_free(monkeypatch, device, free, moves):
    x = Mock(nbytes=100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**9))
    there = infogan.to_device_if_it_fits(x, torch.device(device))
    assert there is (x.to.return_value if moves else x)


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


@mark.parametrize("flags", ["--n-cat 10 --n-cont 20", "--q-augment 1", "--recipe notebook"])
def test_the_step_takes_nothing_from_the_cpu(monkeypatch, flags):
    state, args = tiny_state(flags, SHIFTED, device="meta")
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # meta has none
    for name in infogan.OPTIMISERS:  # Adam counts its steps on the CPU but with capturable=True
        groups = getattr(state, name).param_groups
        setattr(state, name, torch.optim.SGD(groups[0]["params"], 0.1))
    for state.step in (0, 1, 1000, 1008):  # with and without R1; shifted in the end
        batch = tiny_batch(state, args)
        with OnDevice() as mode:
            metrics = infogan.train_step(state, args, batch)
        assert mode.refused == []
        assert {(v.device.type, v.dtype) for v in metrics.values()} == {("meta", torch.float32)}


def test_adam_can_be_captured_where_the_step_is_and_does_not_warn_of_it():
    for flags in ("", "--cuda-graph"):
        state, args = tiny_state(flags)
        infogan.restore(state, infogan.gather_checkpoint(state, args, "") | {"path": "last.pt"})
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


def run_steps(steps: list, *flags: str, device: str = "cpu") -> infogan.State:
    """The state after some steps, one an epoch, with its metrics added up."""
    state, args = tiny_state(SHIFTED, *flags, device=device)
    for state.step, step_once in enumerate(steps):
        state.add(step_once(state, args, tiny_batch(state, args, state.step)))
    return state


def all_equal(one: infogan.State, two: infogan.State) -> bool:
    tensors = [infogan.tensors_of(state) + [*state.sums.values()] for state in (one, two)]
    return all(a.equal(b) for a, b in zip(*tensors, strict=True))


@mark.parametrize("eager, steps", [(0, 1), (0, 36), (2, 2)])
def test_a_replayed_step_is_the_eager_one_after_any_eager_steps(eager, steps):
    """Every variant is captured at once, which changes no result, and a resumed run's optimisers.

    The shift by a pixel begins in epoch 20, so after 36 steps every variant has been replayed.
    """
    graphed, step = Replayed(), infogan.train_step
    one = run_steps([step] * (eager + steps))
    two = run_steps([step] * eager + [graphed] * steps)
    assert {*graphed.graphs} == {(r1, shifts) for r1 in (False, True) for shifts in (False, True)}
    assert all_equal(one, two)


def test_only_variants_that_can_come_are_captured():
    graphed = Replayed()
    run_steps([graphed], "--r1 0 --shift 0")
    assert [*graphed.graphs] == [(False, False)]


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
    one, two = (run_steps([step] * 4) for step in (infogan.train_step, refused))
    assert not refused.graphs and all_equal(one, two)
    said_one_line(capsys, "no CUDA graph: operation not permitted when stream is capturing;")


def test_a_failed_capture_leaves_the_stream_that_torch_does_not(monkeypatch):
    """torch.cuda.graph begins a capture on another stream, and stays on it when that fails."""
    cuda = MagicMock()
    cuda.graph.side_effect = RuntimeError("no memory")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(infogan, "train_step", Mock())
    with raises(RuntimeError, match="no memory"):
        infogan.GraphedStep().capture(None, None, (False, False))
    cuda.set_stream.assert_called_once_with(cuda.current_stream())


@mark.parametrize("words", [
    "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "Tried to allocate 2.00 GiB",
    "FIND was unable to find an engine to execute",
])  # fmt: skip
def test_all_that_torch_says_of_a_full_gpu_is_one_line_with_advice(capsys, words):
    job = Mock(side_effect=RuntimeError(f"{words}\nCompile with more"))
    assert infogan.run("x.py", job, "buy a larger one") == 2
    said_one_line(capsys, "x.py: out of memory; buy a larger one")


def test_another_error_keeps_its_traceback():
    with raises(RuntimeError):
        infogan.run("x.py", Mock(side_effect=RuntimeError("else")))


def test_too_little_memory_is_one_line(capsys):
    """What torch says of a CPU's."""
    assert infogan.run("infogan.py", lambda: torch.empty(10**15)) == 2
    said_one_line(capsys, "infogan.py: out of memory; lower --batch-size")


# on a GPU -----------------------------------------------------------------------------------------

on_gpu = mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@on_gpu
@mark.parametrize("flags", ["", "--recipe notebook", "--n-cat 10"])
def test_a_cuda_graph_computes_what_eager_steps_do(flags):
    """As near as two eager runs come to each other, which atomic sums keep apart."""

    def weights(step_once) -> torch.Tensor:
        state = run_steps([step_once] * 140, flags, "--cuda-graph", device="cuda:0")
        return torch.cat([t.flatten().double() for t in infogan.tensors_of(state)])

    graphed = infogan.GraphedStep()
    eager, again, replayed = map(weights, (infogan.train_step, infogan.train_step, graphed))
    assert graphed.graphs
    apart = (eager - again).abs().mean()
    assert (eager - replayed).abs().mean() <= 3 * apart + 1e-7


@on_gpu
def test_a_run_on_a_gpu_resumes_and_is_shown(faces, tmp_path, capsys):
    flags = tiny(faces, tmp_path / "run", "--device cuda --max-steps")
    for steps in ("24", "48"):
        assert infogan.main([*flags, steps]) == 0
    said = capsys.readouterr().out
    assert torch.cuda.get_device_name(0) in said and "CUDA graph" in said and "step 24" in said
    assert generate.main(["--ckpt", str(tmp_path / "run"), "--samples", "4"]) == 0
