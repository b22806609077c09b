"""The training step as a CUDA graph: one launch per step instead of hundreds.

`GraphedStep` is called like `training_step` and gives the same results. The batch and everything
else that changes from step to step are copied into tensors that stay in place, and the recorded
work of the device is replayed on them. There is a graph for each combination of shapes: few, as
masked patches come in buckets. Rates, temperatures, and the draws of stochastic depth are inputs of
the graph; skipping a step and scaling the loss happen inside. With several processes the step is
two graphs, with one all-reduce of gradients and batch means between them instead of DDP.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ibeton.command import Failure
from ibeton.distributed import rank_and_size
from ibeton.model.config import SWINS, ModelConfig
from ibeton.model.host_inputs import HostInputs
from ibeton.model.masking import to_device
from ibeton.model.optim import AdamW
from ibeton.model.steps import Gradients, Step, StepInputs, set_rates, takes_scalars
from ibeton.stages import stage, untimed

Result = TypeVar("Result")
Metrics = dict[str, Tensor]
Key = tuple[Any, ...]


def obstacle(config: ModelConfig, optimizer: Optimizer, device: torch.device) -> str:
    """Why the steps of a run cannot be CUDA graphs; empty if they can."""
    if device.type != "cuda":
        return "they need a GPU"
    if not isinstance(optimizer, AdamW):
        return "they need --optimizer adamw, without --shard-optimizer"
    if config.arch in SWINS:
        return f"they do not support --arch {config.arch}"
    if config.norm_in_head == "bn" and rank_and_size()[1] > 1:
        return "they do not support --norm-in-head bn with several processes"
    return ""


class Recording(NamedTuple):
    """A recorded step: its inputs, and what runs it on them."""

    inputs: StepInputs
    host_inputs: list[HostInputs]  # of each recorded function
    compute: Callable[[], Gradients] | None  # with several processes: forward and backward
    finish: Callable[[], Metrics]  # the rest, or all of it


class GraphedStep:
    """`step` on CUDA graphs, called as `training_step` is.

    The first step of each combination of shapes runs eagerly, the second is captured, later ones
    are replayed. On a device other than CUDA a "replay" runs the recorded functions again, on the
    same tensors. If a graph cannot be captured, all further steps run eagerly, and `note` says why;
    with `required` that is a RuntimeError. Raises ValueError as `training_step` does.
    """

    def __init__(self, step: Step, required: bool = False) -> None:
        self._step = replace(step, padded=True)
        on_cuda = next(step.ibot.parameters()).is_cuda
        self._recorder = CudaRecorder() if on_cuda else Recorder()
        self._recordings: dict[Key, Recording] = {}
        # Of each eager step: the host's inputs of forward and backward, and of the update
        self._seen: dict[Key, tuple[HostInputs, HostInputs]] = {}
        self._buffers: dict[Key, Tensor] = {}
        self._state = step.optimizer.state
        self._flat: Tensor | None = None
        self._required, self._failed = required, False
        self.note = ""

    def __call__(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: Tensor,
        *,
        epoch: int,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> Metrics:
        step, optimizer = self._step, self._step.optimizer
        inputs = step.inputs(global_crops, local_crops, masks, epoch, lr, weight_decay, momentum)
        if self._state is not optimizer.state:  # a checkpoint was loaded
            self._state = optimizer.state
            self._forget()
            self._seen.clear()
        key = self.key(inputs, epoch)
        if key in self._seen and not self._failed and self._prepare(inputs, epoch, key):
            metrics = self._replay(self._recordings[key])
        else:
            host_inputs = self._seen.setdefault(key, (HostInputs(), HostInputs()))
            metrics = self._run_eagerly(inputs, epoch, *host_inputs)
        set_rates(optimizer, lr, weight_decay)  # numbers again, for those who read them
        return metrics

    def key(self, inputs: StepInputs, epoch: int) -> Key:
        """What a graph is made for: shapes, dtypes, and whether the prototypes are frozen."""
        shapes = (None if t is None else (tuple(t.shape), t.dtype) for t in inputs)
        return (self._step.is_frozen(epoch), *shapes)

    def _prepare(self, inputs: StepInputs, epoch: int, key: Key) -> bool:
        """Have a recording of `key` that holds `inputs`. False if it cannot be captured."""
        if key in self._recordings:
            recording = self._recordings[key]
            _fill(recording.inputs, inputs)
            for host_inputs in recording.host_inputs:
                host_inputs.refill()
            return True
        random = torch.get_rng_state()
        try:
            self._recordings[key] = self._record(inputs, epoch, *self._seen[key])
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            if self._required:
                why = str(error).strip().splitlines()[0]
                raise Failure(
                    f"--cuda-graphs on: capturing a step failed ({why}); use auto or off"
                ) from error
            torch.set_rng_state(random)
            self._failed, why = True, str(error).strip().splitlines()[0]
            self.note = f"CUDA graphs are off, as capturing a step failed: {why}"
            self._forget()
            if self._step.scaler is not None:  # it may believe that gradients are unscaled
                self._step.scaler._per_optimizer_states.clear()
        return not self._failed

    def _record(
        self, inputs: StepInputs, epoch: int, draws: HostInputs, addresses: HostInputs
    ) -> Recording:
        """Record a step on tensors that stay in place and hold `inputs`."""
        step, record = self._step, self._recorder.record
        static = self._static(inputs)
        _fill(static, inputs)
        if rank_and_size()[1] == 1:

            def whole() -> Metrics:
                return step.run(static, epoch)

            return Recording(static, [draws], None, record(whole, draws))
        computed: list[Gradients] = []

        def compute() -> Gradients:
            computed[:] = [step.compute_gradients(static, epoch)]
            self._pack(computed[0])
            return computed[0]

        def update() -> Metrics:
            return step.update_weights(static, epoch, self._unpack(computed[0]), reduced=True)

        first = record(compute, draws)
        return Recording(static, [draws, addresses], first, record(update, addresses))

    def _replay(self, recording: Recording) -> Metrics:
        self._step.ibot.half_weights.refresh()  # the graph relies on the copies of the last step
        with stage("graph"):
            if recording.compute is not None:
                recording.compute()
                self._average()
            # Copied, as the next step overwrites them.
            return {name: value.clone() for name, value in recording.finish().items()}

    def _run_eagerly(
        self, inputs: StepInputs, epoch: int, draws: HostInputs, addresses: HostInputs
    ) -> Metrics:
        """The same step, not recorded. It also does what cannot be captured: it compiles kernels
        and allocates the optimizer's state and the tensors of the host's inputs."""
        step = self._step
        if self._recordings and not self._recorder.has_room():
            self._forget()  # each is captured again when it is next needed
        moved = inputs.on(inputs.global_crops.device, takes_scalars(step.optimizer))
        with self._recorder.warm_up():
            if rank_and_size()[1] == 1:
                with draws.recording():
                    return step.run(moved, epoch)
            with draws.recording():
                computed = step.compute_gradients(moved, epoch)
                self._pack(computed)
            self._average()
            with addresses.recording():
                return step.update_weights(moved, epoch, self._unpack(computed), reduced=True)

    def _pack(self, computed: Gradients) -> None:
        """Put gradients and batch means into one tensor, always the same."""
        parts = [t.flatten() for t in (*self._gradients(), computed.batch_means)]
        # Made by the first step, which is eager: no graph may own it.
        self._flat = torch.cat(parts) if self._flat is None else torch.cat(parts, out=self._flat)

    def _average(self) -> None:
        """Average that tensor over the processes."""
        assert self._flat is not None
        with stage("comm"):
            self._flat /= rank_and_size()[1]
            dist.all_reduce(self._flat)

    def _unpack(self, computed: Gradients) -> Gradients:
        """Take gradients and batch means from that tensor."""
        assert self._flat is not None
        targets = [*self._gradients(), computed.batch_means]
        parts = self._flat.split([t.numel() for t in targets])
        torch._foreach_copy_(targets, [p.view_as(t) for p, t in zip(parts, targets, strict=True)])
        return computed

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._step.ibot.student.parameters() if p.grad is not None]

    def _static(self, inputs: StepInputs) -> StepInputs:
        """Tensors like `inputs` on the device, shared by all graphs with the same shape."""
        device, scalars = inputs.global_crops.device, takes_scalars(self._step.optimizer)
        found: dict[str, Any] = dict.fromkeys(inputs._fields)
        for name, tensor in inputs._asdict().items():
            if tensor is not None:
                key = (name, tensor.shape, tensor.dtype)
                if key not in self._buffers:
                    place = device if name != "rates" or scalars else tensor.device
                    self._buffers[key] = torch.empty_like(tensor, device=place)
                found[name] = self._buffers[key]
        return StepInputs(**found)

    def _forget(self) -> None:
        """Drop all recordings and their memory."""
        self._step.optimizer.zero_grad(set_to_none=True)
        self._recorder.drop(self._recordings)


class Recorder:
    """Records nothing: a replay runs the function again. For devices without graphs, on which tests
    show that inputs, draws, and keys are complete."""

    def record(self, function: Callable[[], Result], draws: HostInputs) -> Callable[[], Result]:
        """What repeats `function` on the values that its tensors hold then."""
        repeats = False

        def replay() -> Result:
            nonlocal repeats
            with draws.repeating() if repeats else draws.recording():
                repeats = True
                return function()

        return replay

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Around a step that is not recorded."""
        yield

    def has_room(self) -> bool:
        """Whether an eager step fits into memory beside the recorded ones."""
        return True

    def drop(self, recordings: dict[Key, Recording]) -> None:
        """Empty `recordings` and release their memory."""
        recordings.clear()


class CudaRecorder(Recorder):
    """Captures CUDA graphs, which share one memory pool, on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool, self._pool_bytes = torch.cuda.graph_pool_handle(), 0

    def record(self, function: Callable[[], Result], draws: HostInputs) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # The loader's threads keep using CUDA meanwhile: only this thread is restricted.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # restored even if the capture fails
            draws.recording(captures=True),
            untimed(),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            result = function()
        self._pool_bytes += torch.cuda.memory_reserved() - before

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """On the capturing stream, so that libraries set up what belongs to it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def has_room(self) -> bool:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] > self._pool_bytes

    def drop(self, recordings: dict[Key, Recording]) -> None:
        torch.cuda.synchronize()
        recordings.clear()
        torch.cuda.empty_cache()
        self._pool, self._pool_bytes = torch.cuda.graph_pool_handle(), 0


def _fill(static: StepInputs, inputs: StepInputs) -> None:
    """Copy `inputs` into tensors that stay in place. The host does not wait."""
    for target, source in zip(static, inputs, strict=True):
        if target is not None and source is not None:
            target.copy_(to_device(source, target.device))
