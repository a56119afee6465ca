"""A network for inference in one call: blocks fused, the rest compiled, everything in CUDA graphs."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convfirst_kernels.acceleration import Report, accelerate

WARMUP_CALLS = 3


class _Turns:
    """Keeps what every thread runs on one device in a sequence, whatever the streams.

    A stage in one launch has thread blocks that wait for one another: two such launches at once could wait for ever.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def taken(self, device: torch.device) -> Iterator[None]:
        """Inside, the current stream has waited for what ran before; costs nothing while the stream stays the same."""
        with self._lock:
            stream, last = torch.cuda.current_stream(device), self._last.get(device)
            if last is not None and last != stream:
                stream.wait_stream(last)
            self._last[device] = stream
            yield


_turns = _Turns()


class CompiledInference:
    """What `compile_for_inference` returns: call it with a batch of images, at most as many as the example had.

    Attributes:
        report: which blocks run fused.
        batches: the batch sizes that have a graph, ascending; a smaller batch runs in the next one of them.
    """

    def __init__(self, model: nn.Module, example: Tensor, batches: Sequence[int], kernels: str, outside: str):
        self.model = model  # the graphs read its parameters
        self.example = example
        self.batches = tuple(sorted({*batches, example.shape[0]}))
        self.report: Report = accelerate(model, kernels=kernels, frozen=True, whole_stages=True)
        self._pool = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        with torch.inference_mode(), torch.cuda.device(example.device), _turns.taken(example.device):
            for batch in reversed(self.batches):  # the largest first: the others fit into its memory
                function = torch.compile(model, dynamic=False) if outside == "inductor" else model
                self._graphs[batch] = self._capture(function, example[:batch])

    def _capture(self, function, example: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static = example.clone(memory_format=torch.channels_last)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, tunes, and packs weights outside the capture
            for _ in range(WARMUP_CALLS):
                function(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function(static)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"compile_for_inference: the model returns {type(output).__name__}; supported is one tensor"
            )
        self._pool = graph.pool()
        return graph, static, output

    def __call__(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> the model's output for N images, in memory of its own.

        Raises:
            ValueError: shape, dtype or device differ from the example's in more than a smaller batch.
        """
        self._check(x)
        batch = next(size for size in self.batches if size >= x.shape[0])
        graph, static, output = self._graphs[batch]
        with torch.inference_mode(), torch.cuda.device(static.device), _turns.taken(static.device):
            static[: x.shape[0]].copy_(x)
            graph.replay()
            return output[: x.shape[0]].clone()

    def graph(self, batch: int) -> torch.cuda.CUDAGraph:
        """What a call of ``batch`` images replays, one of `batches`: to time or profile. Replays must not overlap."""
        return self._graphs[batch][0]

    def _check(self, x: Tensor) -> None:
        like = self.example
        if x.dim() != like.dim() or x.shape[1:] != like.shape[1:] or not 1 <= x.shape[0] <= like.shape[0]:
            wanted = f"[1 to {like.shape[0]}, {', '.join(map(str, like.shape[1:]))}]"
            raise ValueError(f"x has shape {list(x.shape)}; compiled for {wanted}")
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(f"x is {x.dtype} on {x.device}; compiled for {like.dtype} on {like.device}")


def compile_for_inference(
    model: nn.Module,
    example: Tensor,
    batches: Sequence[int] = (),
    kernels: str = "auto",
    outside: str = "inductor",
) -> CompiledInference:
    """The fastest form of a ConvFirst or ConvNeXt that serves any batch up to the example's.

    A copy of the model in evaluation mode, its blocks fused (`accelerate`, weights frozen), what lies outside them
    compiled by Inductor, and a CUDA graph of the whole for each size in ``batches`` and for the example's; the graphs
    share their memory. The model itself stays as it is. Where images are few, each stage of a ConvFirst is one launch
    (`accelerate`'s ``whole_stages``); calls from several threads or streams follow one another on the device. Do not
    run two processes so on one GPU under MPS.

    Args:
        model: on a CUDA device, of the dtype that it shall run in (``model.half()``, ``model.bfloat16()``).
        example: [N, 3, H, W] images of that dtype and device: N is the most that a call may bring.
        batches: further batch sizes, at most N, that get a graph of their own; each is compiled once.
        kernels: "auto", "required" or "off", as of `accelerate`.
        outside: "inductor", or "eager" to skip its compilation.

    Raises:
        ValueError: an argument is none of these.
        RuntimeError: kernels="required" and a block is not covered.

    >>> model = timm.create_model("convnext_tiny", pretrained=True).cuda().half()
    >>> fast = compile_for_inference(model, torch.randn(128, 3, 224, 224, device="cuda", dtype=torch.float16))
    >>> logits = fast(images)
    """
    if example.dim() != 4 or example.shape[0] < 1:
        raise ValueError(f"example has shape {list(example.shape)}; expected [N, channels, height, width] with N >= 1")
    if example.device.type != "cuda":
        raise ValueError(f"example is on {example.device}; CUDA graphs need a CUDA device")
    wrong = [batch for batch in batches if not 1 <= batch <= example.shape[0]]
    if wrong:
        raise ValueError(f"batches has {wrong}; accepted are sizes from 1 to the example's {example.shape[0]}")
    if outside not in ("inductor", "eager"):
        raise ValueError(f"outside={outside!r}; accepted: 'inductor', 'eager'")
    parameter = next(model.parameters(), None)
    if parameter is not None and (parameter.device != example.device or parameter.dtype != example.dtype):
        raise ValueError(
            f"the model is {parameter.dtype} on {parameter.device}, the example {example.dtype} on {example.device}; "
            "they must agree"
        )
    frozen = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return CompiledInference(frozen, example.to(memory_format=torch.channels_last), batches, kernels, outside)
